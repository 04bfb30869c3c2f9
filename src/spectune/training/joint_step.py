"""The optimizer steps of runs that are trained together: one after the other, in one place."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from spectune.training.optimizer import MasterAdamW


@dataclass(frozen=True)
class AskedStep:
    """A step that one run's optimizer is to take: its gradients are there.

    Attributes:
        rate: the run's learning rate in this step.
        max_grad_norm: gradients are clipped to it; 0 leaves them.
        loss: a scalar on the device; where it is not finite, the step is not taken.
    """

    optimizer: MasterAdamW
    rate: float
    max_grad_norm: float
    loss: Tensor


def step_together(asked: Sequence[AskedStep]) -> list[Tensor]:
    """Take the steps of several runs, each as its own optimizer would: clipped by its own norm, and not taken where
    its loss or its gradient is not finite, whatever the others do. Nothing here waits for the device.

    Returns:
        the norm of each run's gradients before clipping, float32 scalars on the device of the gradients.
    """
    return [each.optimizer.step(each.rate, each.max_grad_norm, each.loss) for each in asked]
