"""What a recommendation chooses between: the arms' costs, and what the verdict says of their losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spectune.results import ComparisonResult, Limits, Verdict
from spectune.results.arm_result import ArmResult, arm_results, is_finite, peak_memory
from spectune.results.phrases import named
from spectune.results.recommendation import AXES

#: Two runs of one seed each are not told apart below this share of the loss. Over seeds a run's loss had standard
#: deviations of 0.5% to 2.7% (docs/results/calibration.md); a difference of two has sqrt(2) times as much, and 1.96 of
#: the largest is this.
SEED_NOISE = 0.075
#: Overheads within this share of the base's time are as good as the least: below it measurements at batch 1 do not
#: repeat.
SAME_OVERHEAD = 0.05


@dataclass(frozen=True)
class Candidate:
    """One arm with the numbers that decide; None where nothing was measured.

    Attributes:
        runs: files or folders that prove the numbers.
        judged_loss: None where it is not finite, too. Where a metric decides in its place, that one, negated where more
            is better.
        inference_overhead: as it is served: of the merged model (`merged`) where one task is served and it merges.
    """

    name: str
    label: str
    runs: tuple[str, ...]
    judged_loss: float | None
    relative_performance: float | None
    train_memory_bytes: float | None
    peak_memory_bytes: float | None
    stored_bytes: float | None
    inference_overhead: float | None
    merged: bool
    train_seconds: float | None

    @property
    def rank(self) -> float:
        """Its judged loss; infinite where there is none, so that it is never the lowest."""
        return math.inf if self.judged_loss is None else self.judged_loss

    def cost(self, axis: str) -> float | None:
        """Its value on one of `AXES`."""
        value: float | None = getattr(self, axis)
        return value


def candidates(comparison: ComparisonResult, limits: Limits) -> list[Candidate]:
    """The arms of which a run ended."""
    found = []
    runs_by_arm, arms = comparison.runs_by_arm, arm_results(comparison)
    # times of a busy machine are no argument, nor are the others beside them
    trained_busy, decoded_busy = (
        any(getattr(arm, f"busy_in_{what}") for arm in arms) for what in ("training", "decoding")
    )
    for arm in arms:
        if (runs := runs_by_arm.get(arm.name)) is None:
            continue
        merged = limits.tenants == 1 and arm.inference_overhead_merged is not None
        unmerged = None if decoded_busy else arm.inference_overhead
        found.append(
            Candidate(
                name=arm.name,
                label=named(runs[0].label or arm.name, arm.method),
                runs=tuple(run.place for run in runs),
                judged_loss=_decisive(arm, comparison),
                relative_performance=arm.relative_performance,
                train_memory_bytes=arm.train_memory_bytes,
                peak_memory_bytes=max((peak for run in runs if (peak := peak_memory(run))), default=None),
                stored_bytes=arm.stored_bytes,
                # a merged model runs the base's own operations: what was measured of it is noise
                inference_overhead=0.0 if merged else unmerged,
                merged=merged,
                train_seconds=None if trained_busy else arm.train_seconds,
            )
        )
    return found


def _decisive(arm: ArmResult, comparison: ComparisonResult) -> float | None:
    by = comparison.data.decided_by
    value = arm.loss if comparison.decided_by_loss else arm.metrics.get(by)
    if not is_finite(value):
        return None
    return -value if comparison.data.higher_is_better.get(by, False) else value


@dataclass(frozen=True)
class Quality:
    """What the verdict says of pairs: which are better, and how much worse an arm may be than another. `what` decides:
    the loss, or a metric."""

    judged: bool
    arms: frozenset[str]
    covers_training_noise: bool
    better: set[tuple[str, str]]
    relative: Mapping[tuple[str, str], float]
    open: Mapping[tuple[str, str], float]
    what: str = "loss"

    @classmethod
    def of(cls, verdict: Verdict, arms: Sequence[Candidate]) -> Quality:
        means = verdict.means
        relative, left_open, better = {}, {}, set[tuple[str, str]]()
        for pair in verdict.pairs:
            if (seen := pair.seen_from(pair.a)) is None:
                continue
            a, b, scale = pair.a, pair.b, abs(means[pair.a]) or 1.0
            sign = -1 if verdict.higher_is_better else 1  # how much worse b is than a
            difference, *ends = (sign * value / scale for value in seen)
            low, high = sorted(ends)
            relative[a, b], relative[b, a] = difference, -difference
            left_open[a, b], left_open[b, a] = high, -low
            better |= {(a, b)} if pair.differs else set()
        if not relative:  # nothing but raw numbers: good enough for a picture, not for a pick
            better = {(a.name, b.name) for a in arms for b in arms if a.rank < b.rank < math.inf}
        covers = verdict.covers_training_noise
        what = "loss" if verdict.measure in ("", "judged_loss") else verdict.measure
        return cls(bool(relative), frozenset(means), covers, better, relative, left_open, what)

    @property
    def best(self) -> str:
        """`the lowest loss`, `the best accuracy`."""
        return "the lowest loss" if self.what == "loss" else f"the best {self.what}"

    def is_better(self, a: Candidate, b: Candidate) -> bool:
        return (a.name, b.name) in self.better

    def is_clearly_better(self, a: Candidate, b: Candidate) -> bool:
        """Whether a is better than b by more than rows, and with one seed another seed, could do."""
        beyond = self.covers_training_noise or self.relative.get((a.name, b.name), math.inf) > SEED_NOISE
        return self.is_better(a, b) and beyond

    def dominates(self, a: Candidate, b: Candidate) -> bool:
        """Whether a is as good as b on every axis and better on one. Losses are compared by the verdict; what was not
        measured of either is no argument."""
        both = [(a.cost(axis), b.cost(axis)) for axis in list(AXES)[1:]]
        costs = [(x, y) for x, y in both if x is not None and y is not None]
        worse = self.is_better(b, a) or any(x > y for x, y in costs)
        return not worse and (self.is_better(a, b) or any(x < y for x, y in costs))
