"""Runs of a comparison that share passes: they are trained before their turn.

A run's turn then finds in its folder what it would have come to by itself, but for rounding, and goes on from there as
a comparison does that was interrupted. What cannot share a pass, or was kept from it, is trained in its turn, alone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectune.comparing.arms import Arm
from spectune.comparing.final_runs import final_config
from spectune.comparing.job import QUIET, Job
from spectune.comparing.search import halving
from spectune.comparing.short_runs import ShortRun, point_of, search_settings, trial_of
from spectune.data import Encoded
from spectune.deltas import Delta
from spectune.errors import (
    DivergedError,
    InterruptedRun,
    OutOfMemoryError,
    RunsFailedError,
    SpectuneError,
    WriteError,
    first_line,
)
from spectune.files.plain_console import PlainConsole
from spectune.phases import Phases
from spectune.results import RunResult
from spectune.results.comparison_file import Trial
from spectune.training import Run, TrainingConfig, train_together
from spectune.training.company import MOST, TooManyTogetherError, most_together, room_of
from spectune.training.display import Display
from spectune.training.finished import RESULT_FILE
from spectune.training.observer import Observer
from spectune.training.sharing import why_never_shared, why_not_shared
from spectune.training.starting import Asked

log = logging.getLogger("spectune")

#: what becomes of a run that has ended, or diverged
Keep = Callable[[RunResult | DivergedError, Observer], None]


@dataclass(frozen=True)
class _Wanted:
    """A run that is to share passes. `short`: nothing is shown of it but how far it is."""

    arm: Arm
    config: TrainingConfig
    rows: Encoded
    valid: Encoded
    short: bool
    keep: Keep


@dataclass
class Ahead:
    """Trains what a job's arms will need next, in shared passes.

    Attributes:
        most: runs that share a pass; "auto" takes as many as gain from it, by the plan.
    """

    job: Job
    most: int | str
    _alone: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        job = self.job
        if self.most == "auto" and all(job.plans.get(arm.name, (MOST, None))[0] == 1 for arm in job.arms):
            kind = job.model.device.type
            job.print(f"each run is trained by itself: shared passes gain nothing here ({kind}); --together N has them")
            self.most = 1

    def search(self, arms: Sequence[Arm]) -> None:
        """Make the trials of all arms' searches, those that do not wait for each other in one go."""
        searches = {arm.name: halving(**search_settings(self.job, arm)) for arm in arms}
        by_name, made = {arm.name: arm for arm in arms}, dict[str, list[Trial] | None](dict.fromkeys(searches))
        while made:
            asked = {}
            for name, trials in made.items():
                with contextlib.suppress(StopIteration):
                    asked[name] = [trial_of(self.job, by_name[name], *one) for one in searches[name].send(trials)]
            self._train([self._short(run) for runs in asked.values() for run in runs if not self._saved(run)])
            found = {name: [run.saved(self.job.folder) for run in runs] for name, runs in asked.items()}
            # what is not there is made in the arm's own turn, and so is what follows from it
            made = {name: whole for name, trials in found.items() if (whole := _all_there(trials)) is not None}

    def finals(self, rates: Mapping[str, float]) -> None:
        """Train the final runs of all arms, which have these rates."""
        wanted = []
        for arm in self._of(rates):
            for seed in self.job.schedule.seeds:
                config = final_config(self.job, arm, rates[arm.name], seed)
                if config.output_dir is not None and not (config.output_dir / RESULT_FILE).exists():
                    inputs, keep = self.job.inputs, self._keeping(config.output_dir)
                    wanted.append(_Wanted(arm, config, inputs.train, inputs.valid, short=False, keep=keep))
        self._train(wanted)

    def curves(self, rates: Mapping[str, float]) -> None:
        """Make the points of all data curves but those with all rows."""
        schedule, most = self.job.schedule, len(self.job.inputs.train.examples)
        self._train(
            [
                self._short(run)
                for arm in self._of(rates)
                for rows, steps in schedule.curve
                for seed in schedule.curve_seeds
                if rows != most
                for run in [point_of(self.job, arm, rates[arm.name], rows, steps, seed)]
                if not self._saved(run)
            ]
        )

    def _of(self, rates: Mapping[str, float]) -> list[Arm]:
        return [arm for arm in self.job.arms if arm.name in rates]

    def _saved(self, run: ShortRun[Any]) -> bool:
        return run.saved(self.job.folder) is not None

    def _short(self, run: ShortRun[Any]) -> _Wanted:
        def keep(found: RunResult | DivergedError, observer: Observer) -> None:
            with contextlib.suppress(DivergedError):  # where that is no result, the run's own turn finds it out
                run.save(self.job.folder, found, observer.phases.record())

        return _Wanted(run.arm, self.job.planned(run.arm, run.config), run.rows, run.valid, short=True, keep=keep)

    def _keeping(self, folder: Path) -> Keep:
        def keep(found: RunResult | DivergedError, observer: Observer) -> None:
            self.job.ahead[folder] = found if isinstance(found, DivergedError) else observer.losses

        return keep

    def _train(self, wanted: Sequence[_Wanted]) -> None:
        """Train them, as many in a pass as share one; who would be left by itself is left to its turn."""
        left = [] if self.most == 1 else [one for one in wanted if self._why_alone(one) is None]
        while len(left) > 1:
            count = self._count(left)
            if count == 1:
                return
            group, left = left[:count], left[count:]
            if not self._trained(group):
                left = [*group, *left]

    def _count(self, left: Sequence[_Wanted]) -> int:
        """How many of the first share a pass."""
        plans = [self.job.plans.get(one.arm.name, (MOST, None)) for one in left]
        worth, estimates = [plan[0] for plan in plans], [plan[1] for plan in plans]
        return most_together(self.most, worth, estimates, room_of(self.job.model))

    def _why_alone(self, one: _Wanted) -> str | None:
        """Why an arm's runs are trained by themselves; found out once, and said."""
        name, job = one.arm.name, self.job
        if name not in self._alone:
            self._alone[name] = why_never_shared(one.arm.method)
            if self._alone[name] is None:
                with job.attached(one.arm, one.config.seed, job.phases) as delta:
                    self._alone[name] = why_not_shared(delta)
            if (why := self._alone[name]) is not None:
                job.print(f"{one.arm.label}: each run is trained by itself: {why}")
        return self._alone[name]

    def _trained(self, group: Sequence[_Wanted]) -> bool:
        """Train a group in shared passes. Returns whether that could be done, or is left to the runs' own turns; else
        fewer are to share one from now on."""
        job, begin = self.job, time.perf_counter()
        with contextlib.ExitStack() as stack:
            phases = [stack.enter_context(_paused(job.phases)) for _ in group]
            stack.enter_context(job.bare_after())
            deltas = [
                _attached(job, one, own, number) for number, (one, own) in enumerate(zip(group, phases, strict=True))
            ]
            observers = [Observer(own, memory=False) for own in phases]
            try:
                found = self._found(group, deltas, observers)
            except (InterruptedRun, WriteError):
                raise
            except (OutOfMemoryError, TooManyTogetherError) as error:
                self.most = len(group) // 2
                log.warning("%d runs share a pass from now on, not %d: %s", self.most, len(group), first_line(error))
                return False
            except SpectuneError as error:  # in whose turn it comes again, its run fails
                log.warning("%d runs are trained by themselves, each in its turn: %s", len(group), first_line(error))
                return True
            for one, ended, observer in zip(group, found, observers, strict=True):
                if isinstance(ended, RunResult | DivergedError):
                    observer.phases.go_on()
                    one.keep(ended, observer)
        taken, seconds = sum(one.config.max_steps for one in group), time.perf_counter() - begin
        for one, ended in zip(group, found, strict=True):
            if isinstance(ended, RunResult | DivergedError):
                steps = one.config.max_steps
                job.budget.trained(one.arm.name, steps, seconds * steps / taken)
            else:
                log.warning("a run of %s is trained by itself, in its turn: %s", one.arm.label, first_line(ended))
        return True

    def _found(
        self, group: Sequence[_Wanted], deltas: Sequence[Delta], observers: Sequence[Observer]
    ) -> list[RunResult | SpectuneError]:
        """What each run of a group came to."""
        job, console = self.job, QUIET if group[0].short else self.job.console
        runs = [Run(delta, one.rows, one.valid) for delta, one in zip(deltas, group, strict=True)]
        asked = [
            Asked(one.config, delta.name, job.origin or {}, job.base.valid_loss, job.predictions, None, observer)
            for one, delta, observer in zip(group, deltas, observers, strict=True)
        ]
        try:
            display = self._display(group)
            results = train_together(
                job.model, job.tokenizer, runs, asked=asked, console=console, display=display, share_passes=True
            )
        except RunsFailedError as error:
            for failed in error.failures.values():
                if isinstance(failed, WriteError):
                    raise failed from error
            ended = iter(error.results)
            return [error.failures.get(delta.name) or next(ended) for delta in deltas]  # type: ignore[misc]
        return list(results)

    def _display(self, group: Sequence[_Wanted]) -> Display:
        what = "trials" if group[0].short else "final runs"
        arms = list(dict.fromkeys(one.arm.label for one in group))
        return Display(
            self.job.console or PlainConsole(), f"{len(group)} {what} together ({', '.join(arms)})",
            sum(one.config.max_steps for one in group), 0, heartbeat=self.job.heartbeat, says=not group[0].short,
        )  # fmt: skip


@contextlib.contextmanager
def _paused(whole: Phases) -> Iterator[Phases]:
    """A stopwatch of one of several runs, which take turns: each is counted what passes while it is on."""
    with whole.apart() as part:
        part.pause()
        yield part
        part.go_on()


def _attached(job: Job, one: _Wanted, phases: Phases, number: int) -> Delta:
    """The delta of one of a group, beside the others."""
    phases.go_on()
    # a name of its own, by which the lines of a final run are told apart
    suffix = f".{number}" if one.short else f"-seed-{one.config.seed}"
    delta = job.attach(one.arm, one.config.seed, phases, suffix)
    phases.pause()
    return delta


def _all_there(trials: Sequence[Trial | None]) -> list[Trial] | None:
    there = [trial for trial in trials if trial is not None]
    return there if len(there) == len(trials) else None
