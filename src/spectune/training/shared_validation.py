"""Validation rows, shared out among processes."""

from collections.abc import Callable, Sequence

import torch

from spectune.data import Example
from spectune.evaluation import RowLosses
from spectune.training.distribution import World


def shared_losses(
    rows: Sequence[Example], losses_of: Callable[[Sequence[Example]], RowLosses], world: World, device: torch.device
) -> RowLosses:
    """The loss of each row, in their order, of which each process takes a share; all have all of them afterwards.

    Args:
        losses_of: takes the losses of this process's rows, which are those of one device.
    """
    if world.size == 1:
        return losses_of(rows)
    # rows of like length side by side, so that shares take as long as each other
    own = list(world.share(sorted(range(len(rows)), key=lambda i: -rows[i].length)))
    found = torch.zeros(2, len(rows), dtype=torch.float64)
    if own:
        losses = losses_of([rows[i] for i in own])
        found[:, own] = torch.tensor([losses.loss_sums, losses.target_tokens], dtype=torch.float64)
    # each row is one process's, so that the sum has its numbers as they are
    sums, counts = world.sum(found.to(device)).tolist()
    return RowLosses(tuple(sums), tuple(map(int, counts)))
