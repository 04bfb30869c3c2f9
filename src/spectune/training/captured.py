"""Forward and backward of a batch as one CUDA graph, replayed for every batch of the same shapes.

On small models a GPU is done with a kernel before Python has asked for the next. A graph asks for all of them at once.
It is recorded the third time that a shape comes by, when whatever is compiled is compiled, and it keeps the memory that
the batch needs for itself (https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectune.deltas import Delta
from spectune.errors import first_line
from spectune.planning.flops import flops_per_token

log = logging.getLogger("spectune")

#: times that a shape runs before it is recorded
WARM_UPS = 2
#: graphs that are kept: each has memory of its own
MOST_GRAPHS = 4

#: of a compiled block: what a GPU computes, and what asking for its kernels takes on the host, forward and backward
OPERATIONS_PER_SECOND = 4e14
LAYER_SECONDS = 1.5e-3

#: the loss sum of a batch on the device and its gradient by `divisor` (a scalar tensor): what is recorded
Compute = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass
class _Recorded:
    graph: Any
    batch: dict[str, Tensor]
    divisor: Tensor
    loss: Tensor
    gradients: list[Tensor | None]


class CapturedBackward:
    """Adds the gradients of batches to `parameters`, by graphs where shapes repeat.

    Args:
        compute: forward and backward of one batch; makes no decision that depends on a tensor's values.
        parameters: all that get a gradient.
        device: a CUDA device.
    """

    def __init__(self, compute: Compute, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.compute = compute
        self.parameters = parameters
        self.device = device
        self.works = True
        self._seen: dict[object, int] = {}
        self._recorded: dict[object, _Recorded] = {}

    def __call__(self, batch: Mapping[str, Tensor], divisor: float) -> Tensor:
        """Returns the loss sum, detached. `batch`: on the host."""
        key = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(batch.items()))
        found = self._recorded.get(key)
        if found is None and self._due(key):
            found = self._record(key, batch, divisor)
        if found is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            placed = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            return self.compute(placed, torch.full((), divisor, device=self.device))
        return self._replay(found, batch, divisor)

    def _due(self, key: object) -> bool:
        return self.works and self._seen.get(key, 0) >= WARM_UPS and len(self._recorded) < MOST_GRAPHS

    def _record(self, key: object, batch: Mapping[str, Tensor], divisor: float) -> _Recorded | None:
        before = [parameter.grad for parameter in self.parameters]
        self._set([None] * len(before))
        placed = {name: tensor.to(self.device) for name, tensor in batch.items()}
        number = torch.full((), divisor, device=self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # backward runs in a thread of autograd's
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                loss = self.compute(placed, number)
        except RuntimeError as error:
            self.works = False
            log.warning("steps are not recorded as CUDA graphs, and run one kernel at a time: %s", first_line(error))
            self._set(before)
            return None
        self._recorded[key] = _Recorded(graph, placed, number, loss, [p.grad for p in self.parameters])
        self._set(before)
        return self._recorded[key]

    def _replay(self, found: _Recorded, batch: Mapping[str, Tensor], divisor: float) -> Tensor:
        before = [parameter.grad for parameter in self.parameters]
        # of this step's batches the one before may have left its gradients where this one writes its own
        kept = [grad.clone() if grad is not None and grad is mine else grad
                for grad, mine in zip(before, found.gradients, strict=True)]  # fmt: skip
        for name, tensor in batch.items():
            found.batch[name].copy_(tensor, non_blocking=True)
        found.divisor.fill_(divisor)
        found.graph.replay()
        there = [
            (old, new) for old, new in zip(kept, found.gradients, strict=True) if old is not None and new is not None
        ]
        if there:
            torch._foreach_add_([old for old, _ in there], [new for _, new in there])
        self._set([new if old is None else old for old, new in zip(kept, found.gradients, strict=True)])
        return found.loss.detach().clone()

    def _set(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


def launch_bound(delta: Delta, tokens: int, length: int) -> bool:
    """Whether asking for a batch's kernels takes longer than running them: its operations, forward and backward,
    against some hundred kernels a layer."""
    operations = tokens * flops_per_token(delta.family, delta.method, length)
    return operations / OPERATIONS_PER_SECOND < len(delta.family.layers) * LAYER_SECONDS
