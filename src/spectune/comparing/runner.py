"""Carries out the schedule, arm by arm, and says what it does and how long it will take."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spectune.comparing.ahead import Ahead
from spectune.comparing.arms import Arm
from spectune.comparing.budget import Budget
from spectune.comparing.final_runs import final_folder, final_run
from spectune.comparing.job import FAILED, FailureNote, Job
from spectune.comparing.measure import SECONDS
from spectune.comparing.search import successive_halving
from spectune.comparing.short_runs import on_fewer, search_settings, step_seconds, trial
from spectune.errors import ConfigError, DoesNotFitError, InterruptedRun, OutOfMemoryError, SpectuneError, WriteError
from spectune.results.comparison_file import Trial
from spectune.sizes import duration

log = logging.getLogger("spectune")

#: phases of a final run behind its training
JUDGING = ("judge", "generate", "forget", "costs")


class _GivenUpError(Exception):
    """Nothing more can come of an arm."""


@dataclass
class Runner:
    """Everything that a comparison runs."""

    job: Job

    def __post_init__(self) -> None:
        self.arms, self.schedule = self.job.arms, self.job.schedule
        left, took = [piece for arm in self.arms for piece in self.schedule.pieces(arm.name)], self.job.phases.record()
        # a tuned model is judged as the bare one was, and measured
        guess = sum(took.get(phase, 0.0) for phase in ("judge", "generate")) + 2 * SECONDS
        self.budget = Budget(left, final_steps=self.schedule.final_steps, judging_seconds=guess)
        self.job.budget = self.budget

    def run(self) -> None:
        """All arms, one after another; what fails is noted in its folder, and the rest goes on.

        Raises:
            DoesNotFitError: the plan says that no arm fits into memory.
            InterruptedRun: Ctrl-C, SIGTERM or SIGHUP.
        """
        left = self._fitting()
        self._announce(left)
        if self.job.together is not None:
            self._carry_out(left, Ahead(self.job, self.job.together))
            return
        for arm in left:
            self._carry_out([arm], None)

    def _carry_out(self, arms: Sequence[Arm], ahead: Ahead | None) -> None:
        """The search, the final runs and the data curve of some arms; what `ahead` can, it trains before its turn."""
        rates, fixed = dict[str, float](), self.schedule.learning_rate
        if ahead is not None and fixed is None:
            ahead.search(arms)
        for arm in arms:
            try:
                rates[arm.name] = fixed or self._search(arm)
            except _GivenUpError:
                self.budget.drop(arm.name)
        if ahead is not None:
            ahead.finals(rates)
        self._of_each(rates, self._final_runs)
        if ahead is not None:
            ahead.curves(rates)
        self._of_each(rates, self._curve)

    def _of_each(self, rates: dict[str, float], turn: Callable[[Arm, float], None]) -> None:
        """Runs of each arm that has a rate; one of which nothing more can come has none after that."""
        for arm in [arm for arm in self.arms if arm.name in rates]:
            try:
                turn(arm, rates[arm.name])
            except _GivenUpError:
                self.budget.drop(arm.name)
                del rates[arm.name]

    @property
    def has_run(self) -> bool:
        """Whether there was anything to run that an earlier call had not made."""
        return self.budget.has_spent

    def _announce(self, left: Sequence[Arm]) -> None:
        """Say what there is to do, and how long it will take."""
        schedule, arms = self.schedule, len(self.arms)
        search = " + ".join(f"{count} x {steps}" for count, steps in schedule.planned_trials)
        seeds = len(schedule.seeds)
        each = f"{seeds} final {'run' if seeds == 1 else 'runs'} of {schedule.final_steps:,} steps"
        if search:
            each = f"a search of {search} steps (rates x steps), then {each}"
        if schedule.curve:
            each += f", and runs on {', '.join(f'{rows:,}' for rows, _ in schedule.curve)} rows"
        tokens = schedule.target_tokens_per_step * self.budget.total_steps
        methods = f"{arms} {'method' if arms == 1 else 'methods'}"
        self.job.print(f"budget: {methods}, each {each}: about {tokens:,.0f} target tokens in all")
        folders = [self.job.folder / "runs" / arm.name for arm in self.arms]
        if all(len(list(folder.glob("*/rows.jsonl"))) >= seeds for folder in folders):
            return  # an earlier call has made all final runs: then there is no time to tell
        try:
            self.budget.step_seconds = step_seconds(self.job, left[0])
        except (InterruptedRun, WriteError):
            raise
        except SpectuneError:
            return  # the arm's own runs will say what is wrong with it
        if (seconds := self.budget.seconds_left()) is not None:
            self.job.print(f"about {duration(seconds)}, by two steps of {left[0].label}")

    def _fitting(self) -> list[Arm]:
        """The arms that the plan lets begin; the others have failed. Raises DoesNotFitError where none is left."""
        left: list[Arm] = []
        for arm in self.arms:
            folder = self.job.folder / "search" / arm.name
            (folder / FAILED).unlink(missing_ok=True)
            try:
                self.job.check_memory(arm)
            except DoesNotFitError as error:
                self._failed(folder, arm, None, None, str(error), given_up=True)
                self.budget.drop(arm.name)
                reason = error
            except SpectuneError:
                left.append(arm)  # its own runs say what is wrong with it
            else:
                left.append(arm)
        if not left:
            raise reason
        return left

    def _search(self, arm: Arm) -> float:
        """The best rate of an arm; what was tried goes to its search.json."""
        folder, how = self.job.folder / "search" / arm.name, search_settings(self.job, arm)

        def run(rate: float, steps: int) -> Trial:
            found, seconds = trial(self.job, arm, rate, steps)
            self.budget.ended(arm.name, steps, seconds)
            return found

        try:
            found = successive_halving(trial=run, **how)
        except (InterruptedRun, WriteError):
            raise
        except SpectuneError as error:
            raise self._given_up(folder, arm, None, None, str(error)) from None
        found.write(folder / "search.json")
        if found.best is None:
            reason = f"no learning rate: {found.sentence}. Try --set learning_rate=... below {min(how['bounds']):g}"
            raise self._given_up(folder, arm, None, None, reason)
        self.job.print(f"{arm.label}: {found.sentence}; {self.budget}")
        return found.best

    def _final_runs(self, arm: Arm, rate: float) -> None:
        steps = self.schedule.final_steps
        timed = False  # of the first seed that does not fail
        for seed in self.schedule.seeds:
            try:
                result, seconds = final_run(self.job, arm, rate, seed, timed=not timed)
            except (InterruptedRun, WriteError):
                raise
            except SpectuneError as error:
                folder = final_folder(self.job, arm, rate, seed)
                if isinstance(error, OutOfMemoryError | DoesNotFitError | ConfigError):
                    # another seed changes nothing
                    raise self._given_up(folder, arm, rate, seed, str(error)) from None
                self._failed(folder, arm, rate, seed, str(error))
                self.budget.ended(arm.name, steps, None)
                continue
            timed = timed or result.decode is not None
            judging = sum(result.seconds_by_phase.get(phase, 0.0) for phase in JUDGING)
            self.budget.ended(arm.name, steps, seconds, judging)
            metrics = "".join(f", {name} {value:.4g}" for name, value in result.metrics.items())
            self.job.print(f"{arm.label}, seed {seed}: loss {result.judged_loss:.4f}{metrics}; {self.budget}")

    def _curve(self, arm: Arm, rate: float) -> None:
        folder = self.job.folder / "curve" / arm.name
        (folder / FAILED).unlink(missing_ok=True)
        for rows, steps in self.schedule.curve:
            if rows == len(self.job.inputs.train.examples):
                continue  # a final run is that point
            for seed in self.schedule.curve_seeds:
                try:
                    _, seconds = on_fewer(self.job, arm, rate, rows, steps, seed)
                except (InterruptedRun, WriteError):
                    raise
                except SpectuneError as error:
                    seconds = None
                    self._failed(folder, arm, rate, seed, f"on {rows:,} rows: {error}")
                self.budget.ended(arm.name, steps, seconds)
        if self.schedule.curve:
            self.job.print(f"{arm.label}: data curve done; {self.budget}")

    def _failed(
        self, folder: Path, arm: Arm, rate: float | None, seed: int | None, reason: str, *, given_up: bool = False
    ) -> None:
        note = FailureNote(
            name=arm.name, method=arm.method.name, label=arm.label, seed=seed, learning_rate=rate,
            reason=reason, given_up=given_up,
        )  # fmt: skip
        note.write(folder / FAILED)
        if self.job.console is None:  # who gave a console tells of failures in their own words
            log.warning("%s failed: %s", arm.name, reason)

    def _given_up(self, folder: Path, arm: Arm, rate: float | None, seed: int | None, reason: str) -> _GivenUpError:
        self._failed(folder, arm, rate, seed, reason, given_up=True)
        return _GivenUpError(reason)
