"""To which few lengths padded batches are filled up, so that they come in few shapes: each shape is captured as a CUDA
graph of its own, which has to come back to pay."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from spectune.data import batches, by_length
from spectune.training.config import TrainingConfig

#: lengths at most: the memory of graphs' inputs and outputs, and the time of their capture, go with their number
MOST = 4
#: fewer lengths serve, where more leave out less than this share of the tokens
_WORTH = 0.01
#: steps of an epoch that are looked at
_LOOKED_AT = 200


@dataclass(frozen=True)
class BatchShapes:
    """What padded batches of a run are filled up to.

    Attributes:
        lengths: tokens, ascending; the last is the longest row's.
        rows: of a batch.
        cost: share of tokens that this adds to padding each batch to its own longest row.
    """

    lengths: tuple[int, ...]
    rows: int
    cost: float


def batch_shapes(lengths: Sequence[int], config: TrainingConfig) -> BatchShapes:
    """The shapes for rows of these lengths in tokens: those that cost least in an epoch, whatever the run's seed."""
    size = config.per_device_train_batch_size
    steps = batches(lengths, size * config.gradient_accumulation_steps, seed=0, epoch=0,
                    group_by_length=config.group_by_length)[:_LOOKED_AT]  # fmt: skip
    found = [batch for rows in steps for batch in by_length(rows, lengths, size)]
    longest = Counter(max(lengths[row] for row in batch) for batch in found)
    longest[max(lengths)] += 0  # any batch of another epoch may have it
    rows = min(size, len(lengths))
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in found)
    chosen, places = few_lengths(longest)
    return BatchShapes(chosen, rows, places * rows / padded - 1)


def few_lengths(longest: Counter[int]) -> tuple[tuple[int, ...], int]:
    """The few lengths that batches are filled up to, ascending, and the tokens of a row of each. `longest`: batches by
    the length of their longest row."""
    chosen, places = _fewest(longest, 1)
    for count in range(2, MOST + 1):
        more, fewer = _fewest(longest, count)
        if places - fewer >= _WORTH * places:
            chosen, places = more, fewer
    return chosen, places


def _fewest(longest: Counter[int], count: int) -> tuple[tuple[int, ...], int]:
    """At most `count` of the lengths that serve all with the fewest places, and their number: exactly, by dynamic
    programming over the lengths in order. `longest`: batches by the length of their longest row."""
    sizes = sorted(longest)
    batches_up_to = [0]
    for size in sizes:
        batches_up_to.append(batches_up_to[-1] + longest[size])
    # of the first n lengths: the fewest places, and which are chosen
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())] + [
        (batches_up_to[n] * sizes[n - 1], (sizes[n - 1],)) for n in range(1, len(sizes) + 1)
    ]
    for _ in range(count - 1):
        best = [best[0]] + [
            min(
                (best[m][0] + (batches_up_to[n] - batches_up_to[m]) * sizes[n - 1], (*best[m][1], sizes[n - 1]))
                for m in range(n)
            )
            for n in range(1, len(sizes) + 1)
        ]
    places, chosen = best[-1]
    return chosen, places
