"""Rows of several runs side by side in one batch, and what each of them weighs there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.data import Example, collate
from spectune.objectives import Objective

#: batches share a pass where padding all to the longest computes at most so many times the tokens that they have alone
_PADDED = 1.25


@dataclass(frozen=True)
class Share:
    """One batch of one run.

    Attributes:
        run: its number among those that take the step.
        name: of its delta.
        examples: its rows.
        targets: of the run's whole step, by which its loss is divided.
    """

    run: int
    name: str
    examples: Sequence[Example]
    targets: int

    @property
    def longest(self) -> int:
        """Tokens of its longest row."""
        return max(example.length for example in self.examples)


@dataclass(frozen=True)
class JointBatch:
    """A batch of rows of several runs.

    Attributes:
        runs: the numbers of the runs, in the order of their rows.
        names: the delta of each row.
        tensors: on the host.
        counts: targets of each run in it.
        weights: what each target's loss counts in the sum whose gradient is that of all runs, float32 `[targets]`.
    """

    runs: tuple[int, ...]
    names: tuple[str, ...]
    tensors: dict[str, Tensor]
    counts: list[int]
    weights: Tensor


def in_passes(shares: Sequence[Share]) -> list[list[Share]]:
    """Shares in as few passes as padding allows, the longest first; of one run at most one in each."""
    passes = list[list[Share]]()
    for share in sorted(shares, key=lambda share: -share.longest):
        for found in passes:
            if all(other.run != share.run for other in found) and _padded([*found, share]) <= _PADDED:
                found.append(share)
                break
        else:
            passes.append([share])
    # in the order of the runs, so that the same runs are the same route
    return [sorted(found, key=lambda share: share.run) for found in passes]


def _padded(shares: Sequence[Share]) -> float:
    """How many times the tokens are computed that these have, each padded by itself."""
    longest, rows = max(share.longest for share in shares), sum(len(share.examples) for share in shares)
    return longest * rows / sum(share.longest * len(share.examples) for share in shares)


def joint_batch(shares: Sequence[Share], objective: Objective, pad_token_id: int, *, mask_free: bool) -> JointBatch:
    """One batch of these shares. `mask_free`: padding on the right needs no mask."""
    examples = [example for share in shares for example in share.examples]
    batch = collate(examples, pad_token_id)
    if mask_free or bool(batch["attention_mask"].all()):
        del batch["attention_mask"]
    objective.precompute(batch)
    labels = batch["labels"]
    owner = torch.tensor([number for number, share in enumerate(shares) for _ in share.examples])
    # rows come in the order of the runs, and so do their targets
    of_target = owner[batch["positions"] // (labels[0].numel() if labels.dim() > 1 else 1)]
    counts = torch.bincount(of_target, minlength=len(shares))
    weights = torch.repeat_interleave(1 / torch.tensor([float(share.targets) for share in shares]), counts)
    names = tuple(share.name for share in shares for _ in share.examples)
    return JointBatch(tuple(share.run for share in shares), names, batch, counts.tolist(), weights)
