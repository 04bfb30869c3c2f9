"""The memory of a pass that several runs share: one base, the activations of all rows, the states of each run."""

from collections.abc import Sequence

from spectune.planning.estimate import Estimate
from spectune.planning.flops import virtual_in_sequence

#: what a pass of several runs makes of its rows, of what the runs make by themselves: where all are of one method, and
#: where they are not, whose rows are cut out and joined again at each site. Measured, 2 to 8 runs on GPT-2 and Llama of
#: 256 features, float32: 1.01 to 1.04, and 1.46 to 1.48
ALIKE, UNLIKE = 1.05, 1.5


def planned_together(estimates: Sequence[Estimate]) -> int:
    """Bytes of the device that runs of one base take whose rows go through one pass, without the process's context.

    Each is counted as by itself, the base once, and what mixed rows take more (`ALIKE`, `UNLIKE`). Rows are filled up
    to the longest of any run, virtual tokens in the sequence among them: what a run makes in its step grows with them.
    A validation batch is of one run alone, beside the states of all.

    Args:
        estimates: of each run's longest batch by itself.
    """
    if not estimates:
        return 0
    base = max(one.base_weights for one in estimates)
    widths = [one.length + _virtual(one) for one in estimates]
    states = [one.weights - one.base_weights + one.optimizer for one in estimates]
    made = sum(
        max(0, one.peak_reserved - one.base_weights - state) * max(widths) / width
        for one, state, width in zip(estimates, states, widths, strict=True)
    )
    more = 1.0 if len(estimates) == 1 else ALIKE if len({one.method for one in estimates}) == 1 else UNLIKE
    training = sum(states) + int(more * made)
    validation = max(
        (one.validation or 0) - one.base_weights - state for one, state in zip(estimates, states, strict=True)
    )
    return base + max(training, sum(states) + validation)


def largest_part(estimates: Sequence[Estimate], room: int | None, most: int) -> int:
    """How many of the first runs fit into a pass: at least 1, at most `most`. `room`: bytes; None is without limit."""
    count = 1
    while count < min(most, len(estimates)) and (room is None or planned_together(estimates[: count + 1]) <= room):
        count += 1
    return count


def _virtual(estimate: Estimate) -> int:
    built = estimate.question.planner.built
    return virtual_in_sequence(estimate.question.planner.workload.method, built.whole.family)
