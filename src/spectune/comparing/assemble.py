"""A comparison's content, put together from the folders of its runs: what `comparison.json` holds."""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from spectune.comparing import conditions
from spectune.comparing.advising.recommend import recommend
from spectune.comparing.conditions import RecordedConditions
from spectune.comparing.final_runs import measured
from spectune.comparing.intact import changed_since
from spectune.comparing.job import FAILED, FailureNote
from spectune.comparing.judging.verdict import verdict
from spectune.comparing.short_runs import curve_point
from spectune.errors import some
from spectune.results import ComparedRun, ComparisonResult, Limits
from spectune.results.comparison_file import FORMAT_VERSION, Arm, CurvePoint, Failure, Missing, Search
from spectune.results.record import Record
from spectune.results.time_spent import added

log = logging.getLogger("spectune")
R = TypeVar("R", bound=Record)


def assemble(folder: Path, limits: Limits | None = None) -> ComparisonResult:
    """Everything that the runs in a comparison's folder say, with the verdict and the recommendation that follow.

    Runs that are not there (a comparison that was killed) are named under `missing`; runs under other settings than
    the last call's, which an earlier call left, are not taken.

    Args:
        limits: of the user; by default those that the comparison was made with.

    Raises:
        DataError: the folder holds no comparison, or a result in it is damaged.
    """
    found = conditions.read(folder, warn=lambda _: None)
    changed = changed_since(folder)
    fixed = found.preset.fixed_learning_rate
    # where the rate was given, what an earlier call searched for is not what was run
    read = _Reader(changed)
    recorded = {arm.name: read(folder / "search" / arm.name / "search.json", Search) for arm in found.arms}
    searches = {name: search for name, search in recorded.items() if search is not None and fixed is None}
    result = ComparisonResult(
        format_version=FORMAT_VERSION, base=found.base, other_bases=found.other_bases, data=found.data,
        settings=found.settings, environment=found.environment, scale=found.scale, preset=found.preset,
        searches=searches, arms=[], runs=[], curves=[], failed=[], missing=[], seconds_by_phase=found.seconds_by_phase,
    )  # fmt: skip
    for arm in found.arms:
        rate = fixed if fixed is not None else searches.get(arm.name, Search()).best
        _add_arm(result, folder, found, arm, rate, read)
    if changed:
        result.changed = [line.replace(f"{folder}{os.sep}", "") for line in changed]
        log.warning("%s: changed or damaged after it was written, and shown as it is: %s", folder, some(result.changed))
    rates = [run.decode_tokens_per_second_base for run in result.runs if run.decode_tokens_per_second_base]
    result.base.decode_tokens_per_second = statistics.median(rates) if rates else None
    result.verdict = verdict(result, folder)
    result.recommendation = recommend(result, limits if limits is not None else found.limits)
    return result


class _Reader:
    """Reads parts of the content from disk. `changed` is told of those that are not as they were written."""

    def __init__(self, changed: list[str]) -> None:
        self.changed = changed

    def __call__(self, path: Path, kind: type[R]) -> R | None:
        """None where there is no such file. Raises DataError where it is damaged."""
        again = "Remove it, and run the comparison again with --resume"
        return kind.read(path, what=f"a {kind.__name__.lower()}", again=again, warn=self.changed.append)


def _add_arm(
    result: ComparisonResult, folder: Path, found: RecordedConditions, arm: Arm, rate: float | None, read: _Reader
) -> None:
    runs: list[ComparedRun] = []
    failures = [read(folder / "search" / arm.name / FAILED, FailureNote)]
    for seed in found.preset.seeds:
        place = _final_folder(folder, found, arm, rate, seed)
        run = None if place is None else measured(place, warn=lambda _: None)
        if run is not None:
            runs.append(ComparedRun(**run.model_dump(mode="json"), label=arm.label, best_for=arm.best_for))
        elif place is not None and (failure := read(place / FAILED, FailureNote)) is not None:
            failures.append(failure)
        elif not any(failure is not None and failure.given_up for failure in failures):
            result.missing.append(Missing(name=arm.name, seed=seed))
    failures.append(read(folder / "curve" / arm.name / FAILED, FailureNote))
    result.runs += runs
    result.curves += _curve(folder, found, arm, rate, read)
    noted = [note.model_dump(exclude={"given_up"}, exclude_unset=True) for note in failures if note is not None]
    result.failed += [Failure(**note) for note in noted]
    counts = {key: getattr(runs[0], key) if runs else None for key in ("stored_parameters", "trainable_parameters")}
    took = [trial.seconds_by_phase for trial in result.searches.get(arm.name, Search()).trials]
    took += [run.seconds_by_phase for run in runs]
    took += [point.seconds_by_phase for point in result.curves if point.name == arm.name]
    result.arms.append(arm.model_copy(update={**counts, "seconds_by_phase": added(took)}))


def _final_folder(folder: Path, found: RecordedConditions, arm: Arm, rate: float | None, seed: int) -> Path | None:
    """Where the final run of a seed lies under just these conditions; None where no rate is known yet."""
    steps = found.preset.final_steps
    if rate is None or steps is None:
        return None
    key = conditions.run_key(found.identity, arm.settings, rate, steps, seed)
    return folder / conditions.final_place(arm.name, seed, key)


def _curve(
    folder: Path, found: RecordedConditions, arm: Arm, rate: float | None, read: _Reader
) -> Iterator[CurvePoint]:
    """The points of an arm's data curve; final runs are those with all rows."""
    if rate is None:
        return
    for rows, steps in found.preset.curve:
        for seed in found.preset.seeds:
            if rows == found.data.train_examples:
                place = _final_folder(folder, found, arm, rate, seed)
                run = None if place is None else measured(place, warn=lambda _: None)
                point = None if run is None else curve_point(run, arm.name, rows)
            else:
                key = conditions.run_key(found.identity, arm.settings, rate, steps, seed, rows)
                place = folder / conditions.curve_place(arm.name, rows, seed, key)
                point = read(place / "result.json", CurvePoint)
            if point is not None:
                yield point
