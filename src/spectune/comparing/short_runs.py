"""Runs that keep nothing but a small result: trials of the search, points of a data curve, a few steps to time. Each is
taken from its folder where an earlier call has finished it."""

import itertools
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from spectune.comparing.arms import Arm
from spectune.comparing.conditions import curve_place
from spectune.comparing.job import QUIET, Job, subset
from spectune.data import Encoded
from spectune.errors import DataError, DivergedError
from spectune.phases import Phases
from spectune.results import RunResult
from spectune.results.comparison_file import CurvePoint, Trial
from spectune.results.record import Record
from spectune.training import TrainingConfig
from spectune.training.display import Display
from spectune.training.observer import Observer
from spectune.training.peaks import MEMORY_STEPS

log = logging.getLogger("spectune")

#: a run on fewer rows is validated at so many points, and the best one counts
CURVE_VALIDATIONS = 5
#: trials draw weights and batches with seeds of their own: the rate is not chosen by the luck of a final run's seed
SEARCH_SEED = 10_000
#: of a run by itself whose arm's runs share passes: two in which memory is counted, and those that are timed
ALONE_STEPS = 12
#: a key of the file alone: the folder that it is of, whose name says of which arm, rate, steps, rows and seed
PLACE = "place"
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class ShortRun(Generic[R]):
    """A run of which nothing is kept but a small result.

    Attributes:
        path: of the small result, and `kind` its class.
        made: the small result, of what the run came to. Raises the divergence where that is no result.
        trying: what it is for.
    """

    arm: Arm
    config: TrainingConfig
    rows: Encoded
    valid: Encoded
    path: Path
    kind: type[R]
    trying: str
    made: Callable[[RunResult | DivergedError], R]

    def saved(self, folder: Path) -> R | None:
        """The small result that an earlier call left in the comparison's `folder`; None where it has to be made."""
        return _saved(self.path, self.kind, folder)

    def save(self, folder: Path, found: RunResult | DivergedError, seconds_by_phase: dict[str, float]) -> R:
        """Write the small result of a run that has ended, or diverged."""
        made = self.made(found).model_copy(update={"seconds_by_phase": seconds_by_phase})
        _save(made, self.path, folder)
        return made


def search_settings(job: Job, arm: Arm) -> dict[str, Any]:
    """The search for an arm's rate, as `spectune.comparing.search.halving` takes it."""
    rates, preset = job.rates(arm), job.schedule.preset
    bounds = rates.search_range if preset.around_default is None else rates.around(preset.around_default)
    return {"bounds": bounds, "rungs": job.schedule.rungs, "source": rates.sentence, "extensions": preset.extensions}


def trial_of(job: Job, arm: Arm, rate: float, steps: int) -> ShortRun[Trial]:
    """One rate for so many steps."""
    seed = job.config.seed + SEARCH_SEED
    label = f"{rate:g}-{steps}-{job.key(arm, rate, steps, seed)}"
    valid = subset(job.inputs.valid, job.schedule.preset.search_rows, job.config.seed)

    def made(found: RunResult | DivergedError) -> Trial:
        reason, loss, targets = None, None, 0
        if isinstance(found, DivergedError):
            reason = str(found).split(". ", 1)[0]
        else:
            loss, targets = found.valid_loss, found.target_tokens
        return Trial(
            learning_rate=rate, steps=steps, target_tokens=targets, valid_loss=loss, reason=reason, extension=False
        )

    return ShortRun(
        arm, job.config_of(rate, steps, seed, eval_steps=steps), job.inputs.train, valid,
        job.folder / "search" / arm.name / label / "result.json", Trial, f"trying learning rate {rate:g}", made,
    )  # fmt: skip


def trial(job: Job, arm: Arm, rate: float, steps: int) -> tuple[Trial, float | None]:
    """One rate for so many steps, and the seconds it took; None where an earlier call had made it."""
    return _made(job, trial_of(job, arm, rate, steps))


def step_seconds(job: Job, arm: Arm, steps: int = 2) -> float:
    """Seconds of a training step of this arm, of a run that is thrown away."""
    config = job.config_of(1e-6, steps, job.config.seed, eval_steps=steps)
    rows = job.inputs.train, subset(job.inputs.valid, 1, 0)
    return _run(job, arm, config, *rows, job.phases, "timing a step").train_seconds / steps


def by_itself(job: Job, arm: Arm, config: TrainingConfig) -> dict[str, Any]:
    """Fields of the result of a run that shared passes, from the first steps of the same run by itself, which is thrown
    away: its speed, its peaks of memory and the machine's load. `config`: the run's."""
    steps = min(config.max_steps, ALONE_STEPS)
    changes = {"max_steps": steps, "eval_steps": steps, "save_steps": None, "early_stopping_patience": None}
    short = config.model_copy(update={**changes, "output_dir": None, "resume": False})
    longest = sorted(job.inputs.valid.examples, key=lambda example: -example.length)
    valid = Encoded(longest[: config.per_device_eval_batch_size], job.inputs.valid.report)
    times = _StepTimes(QUIET, "", steps, 0)
    observer = Observer(Phases(), display=times)
    with job.attached(arm, config.seed, observer.phases) as delta:
        found = job.run(delta, short, job.inputs.train, valid, observer, "measured by itself", config)
    # compiling and capturing, which a whole run has once, make the mean of so few steps slower, and not the median
    usual = found.train_tokens / found.steps / times.median(MEMORY_STEPS) if steps > MEMORY_STEPS + 1 else 0.0
    return {
        "train_tokens_per_second_alone": max(found.train_tokens_per_second, usual),
        "peak_memory_bytes": found.peak_memory_bytes, "machine_load": found.machine_load,
    }  # fmt: skip


class _StepTimes(Display):
    """A display that shows nothing, and notes when each step was taken."""

    ends: list[float]

    def __enter__(self) -> Self:
        self.ends = []
        return super().__enter__()

    def step(self, loss: float, tokens_per_second: float) -> None:
        self.ends.append(time.perf_counter())

    def median(self, left_out: int) -> float:
        """Seconds from one step to the next, without the first."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.ends[left_out - 1 :]))


def point_of(job: Job, arm: Arm, rate: float, rows: int, steps: int, seed: int) -> ShortRun[CurvePoint]:
    """One point of a data curve: the first `rows` of a seeded order, so that each set holds the smaller ones."""
    place = curve_place(arm.name, rows, seed, job.key(arm, rate, steps, seed, rows))

    def made(found: RunResult | DivergedError) -> CurvePoint:
        if isinstance(found, DivergedError):
            raise found
        return curve_point(found, arm.name, rows)

    return ShortRun(
        arm, job.config_of(rate, steps, seed, eval_steps=max(1, steps // CURVE_VALIDATIONS)),
        subset(job.inputs.train, rows, job.config.seed), job.inputs.valid, job.folder / place / "result.json",
        CurvePoint, f"on {rows:,} rows", made,
    )  # fmt: skip


def on_fewer(job: Job, arm: Arm, rate: float, rows: int, steps: int, seed: int) -> tuple[CurvePoint, float | None]:
    """One point of a data curve, and its seconds."""
    return _made(job, point_of(job, arm, rate, rows, steps, seed))


def curve_point(result: RunResult, arm: str, rows: int) -> CurvePoint:
    """A run as a point of a data curve."""
    kept = set(CurvePoint.model_fields) - {"name", "rows"}
    return CurvePoint(name=arm, rows=rows, **result.model_dump(include=kept))


def _made(job: Job, run: ShortRun[R]) -> tuple[R, float | None]:
    """What a short run comes to, and its seconds; None where an earlier call had made it."""
    if (done := run.saved(job.folder)) is not None:
        return done, None
    begin = time.perf_counter()
    with job.phases.apart() as phases:
        found: RunResult | DivergedError
        try:
            found = _run(job, run.arm, run.config, run.rows, run.valid, phases, run.trying)
        except DivergedError as error:
            found = error
        made = run.save(job.folder, found, phases.record())
    return made, time.perf_counter() - begin


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
