"""Runs that keep nothing but a small result: trials of the search, points of a data curve, a few steps to time. Each is
taken from its folder where an earlier call has finished it."""

import logging
import time
from pathlib import Path
from typing import TypeVar

from spectune.comparing.arms import Arm
from spectune.comparing.conditions import curve_place
from spectune.comparing.job import Job, subset
from spectune.data import Encoded
from spectune.errors import DataError, DivergedError
from spectune.phases import Phases
from spectune.results import RunResult
from spectune.results.comparison_file import CurvePoint, Trial
from spectune.results.record import Record
from spectune.training import TrainingConfig
from spectune.training.observer import Observer

log = logging.getLogger("spectune")

#: a run on fewer rows is validated at so many points, and the best one counts
CURVE_VALIDATIONS = 5
#: trials draw weights and batches with seeds of their own: the rate is not chosen by the luck of a final run's seed
SEARCH_SEED = 10_000
#: a key of the file alone: the folder that it is of, whose name says of which arm, rate, steps, rows and seed
PLACE = "place"
R = TypeVar("R", bound=Record)


def trial(job: Job, arm: Arm, rate: float, steps: int) -> tuple[Trial, float | None]:
    """One rate for so many steps, and the seconds it took; None where an earlier call had made it."""
    seed = job.config.seed + SEARCH_SEED
    label = f"{rate:g}-{steps}-{job.key(arm, rate, steps, seed)}"
    path = job.folder / "search" / arm.name / label / "result.json"
    if (done := _saved(path, Trial, job.folder)) is not None:
        return done, None
    begin = time.perf_counter()
    config = job.config_of(rate, steps, seed, eval_steps=steps)
    reason, loss, targets = None, None, 0
    with job.phases.apart() as phases:
        rows = job.inputs.train, subset(job.inputs.valid, job.schedule.preset.search_rows, job.config.seed)
        try:
            result = _run(job, arm, config, *rows, phases, f"trying learning rate {rate:g}")
            loss, targets = result.valid_loss, result.target_tokens
        except DivergedError as error:
            reason = str(error).split(". ", 1)[0]
        run = Trial(
            learning_rate=rate, steps=steps, target_tokens=targets, valid_loss=loss, reason=reason, extension=False,
            seconds_by_phase=phases.record(),
        )  # fmt: skip
        _save(run, path, job.folder)
    return run, time.perf_counter() - begin


def step_seconds(job: Job, arm: Arm, steps: int = 2) -> float:
    """Seconds of a training step of this arm, of a run that is thrown away."""
    config = job.config_of(1e-6, steps, job.config.seed, eval_steps=steps)
    rows = job.inputs.train, subset(job.inputs.valid, 1, 0)
    return _run(job, arm, config, *rows, job.phases, "timing a step").train_seconds / steps


def on_fewer(job: Job, arm: Arm, rate: float, rows: int, steps: int, seed: int) -> tuple[CurvePoint, float | None]:
    """One point of a data curve, and its seconds: the first `rows` of a seeded order, so that each set holds the
    smaller ones."""
    place = curve_place(arm.name, rows, seed, job.key(arm, rate, steps, seed, rows))
    path = job.folder / place / "result.json"
    if (done := _saved(path, CurvePoint, job.folder)) is not None:
        return done, None
    begin = time.perf_counter()
    config = job.config_of(rate, steps, seed, eval_steps=max(1, steps // CURVE_VALIDATIONS))
    with job.phases.apart() as phases:
        some = subset(job.inputs.train, rows, job.config.seed), job.inputs.valid
        result = _run(job, arm, config, *some, phases, f"on {rows:,} rows")
        point = curve_point(result, arm.name, rows)
        point.seconds_by_phase = phases.record()
        _save(point, path, job.folder)
    return point, time.perf_counter() - begin


def curve_point(result: RunResult, arm: str, rows: int) -> CurvePoint:
    """A run as a point of a data curve."""
    kept = set(CurvePoint.model_fields) - {"name", "rows"}
    return CurvePoint(name=arm, rows=rows, **result.model_dump(include=kept))


def _run(
    job: Job, arm: Arm, config: TrainingConfig, rows: Encoded, valid: Encoded, phases: Phases, trying: str
) -> RunResult:
    with job.attached(arm, config.seed, phases) as delta:
        return job.run(delta, job.planned(arm, config), rows, valid, Observer(phases), trying)


def _save(record: Record, path: Path, folder: Path) -> None:
    place = path.parent.relative_to(folder).as_posix()
    type(record).model_validate({**record.to_dict(), PLACE: place}).write(path)


def _saved(path: Path, kind: type[R], folder: Path) -> R | None:
    """The small result that an earlier call left; None where there is none, a damaged one, or another folder's: it is
    made anew."""
    try:
        found = kind.read(path, what="a small result")
    except DataError as error:
        log.warning("%s: it is made anew", error)
        return None
    if found is None:
        return None
    if not of_its_folder(found, path, folder):
        log.warning("%s is of another folder than the one that it stands in: it is made anew", path)
        return None
    # files of earlier versions do not say where their time went
    return found if found.model_fields_set >= set(kind.model_fields) - {"seconds_by_phase"} else None


def of_its_folder(found: Record, path: Path, folder: Path) -> bool:
    """Whether a small result is of the folder that it was read from. The key that says so is taken out: it is the
    file's, not the result's. Files of earlier versions have none."""
    return (found.model_extra or {}).pop(PLACE, None) in (None, path.parent.relative_to(folder).as_posix())
