"""Rows of several runs side by side in one batch, and what each of them weighs there."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.data import Example, collate, filled
from spectune.objectives import Objective
from spectune.training.batch_shapes import few_lengths
from spectune.training.step_batches import Batches

#: steps of each run that are looked at for the shapes of its batches
_LOOKED_AT = 200
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
        rows: that it is filled up to, where batches are to come in few shapes.
    """

    run: int
    name: str
    examples: Sequence[Example]
    targets: int
    rows: int = 0

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


def shares_of(run: int, name: str, batches: Batches, window: Sequence[Sequence[int]], targets: int) -> list[Share]:
    """The batches of a step of one run."""
    size = min(batches.config.per_device_train_batch_size, len(batches.examples))
    return [Share(run, name, [batches.examples[row] for row in batch], targets, size) for batch in window]


def joint_lengths(runs: Sequence[Batches]) -> tuple[int, ...]:
    """The few lengths in tokens that padded batches of these runs together are filled up to."""
    longest, of_each = Counter[int](), [batches.windows(0)[:_LOOKED_AT] for batches in runs]
    for step in range(max(map(len, of_each))):
        taking = [(batches, windows[step % len(windows)]) for batches, windows in zip(runs, of_each, strict=True)]
        shares = [share for n, (batches, window) in enumerate(taking) for share in shares_of(n, "", batches, window, 1)]
        longest.update(max(share.longest for share in found) for found in in_passes(shares))
    longest[max(max(batches.lengths) for batches in runs)] += 0  # any batch of another epoch may have it
    return few_lengths(longest)[0]


def joint_batch(
    shares: Sequence[Share], objective: Objective, pad_token_id: int, *, mask_free: bool, lengths: Sequence[int] = ()
) -> JointBatch:
    """One batch of these shares.

    Args:
        mask_free: padding on the right needs no mask.
        lengths: that it is filled up to one of, ascending, and each run's rows to their number; without any, to the
            longest row.
    """
    longest = max(share.longest for share in shares)
    length = next((size for size in lengths if size >= longest), longest)
    rows = [max(len(share.examples), share.rows if lengths else 0) for share in shares]
    each = [
        filled(collate(share.examples, pad_token_id), count, length, pad_token_id)
        for share, count in zip(shares, rows, strict=True)
    ]
    batch = {name: torch.cat([part[name] for part in each]) for name in each[0]}
    # batches of one shape are one graph's, with a mask or without: not now and then without
    if mask_free or (len(lengths) < 2 and bool(batch["attention_mask"].all())):
        del batch["attention_mask"]
    objective.precompute(batch)
    labels = batch["labels"]
    # rows come in the order of the runs, and so do their targets
    tokens = labels[0].numel() if labels.dim() > 1 else 1
    ends = torch.tensor([0, *itertools.accumulate(count * tokens for count in rows)])
    before: list[int] = torch.searchsorted(batch["positions"], ends).tolist()
    counts = [b - a for a, b in itertools.pairwise(before)]
    each_weighs = 1 / torch.tensor([float(share.targets) for share in shares])
    weights = torch.cat([weight.expand(count) for weight, count in zip(each_weighs, counts, strict=True)])
    names = tuple(share.name for share, count in zip(shares, rows, strict=True) for _ in range(count))
    return JointBatch(tuple(share.run for share in shares), names, batch, counts, weights)
