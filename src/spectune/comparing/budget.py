"""What a comparison has still to do: stated before it starts, and as it goes."""

from dataclasses import dataclass, field

from spectune.sizes import duration


@dataclass
class Budget:
    """Planned and finished work in optimizer steps; every step has the same number of rows for every method.

    Attributes:
        left: (arm, steps) of each run that has not ended.
        step_seconds: a first guess, from a few steps of one method.
        final_steps: of a final run, which is judged and measured behind its steps.
        judging_seconds: a first guess of what that takes.
    """

    left: list[tuple[str, int]]
    step_seconds: float | None = None
    final_steps: int | None = None
    judging_seconds: float = 0.0
    _judged: list[float] = field(default_factory=list)
    _trained: list[tuple[str, int]] = field(default_factory=list)
    _spent: dict[str, tuple[int, float]] = field(default_factory=dict)
    _finished: int = 0

    def __post_init__(self) -> None:
        self.total_steps = sum(steps for _, steps in self.left)

    def ended(self, arm: str, steps: int, seconds: float | None, judging: float | None = None) -> None:
        """A run has ended; `seconds` is None where an earlier call made it, whose time is not known. `judging`: those
        of a final run that were not training."""
        if (arm, steps) in self._trained:
            self._trained.remove((arm, steps))
            self._judged += [] if judging is None else [judging]
            return
        if (arm, steps) in self.left:
            self.left.remove((arm, steps))
        else:  # an extension of the search, which was not planned
            self.total_steps += steps
        self._finished += steps
        if seconds is not None:
            before = self._spent.get(arm, (0, 0.0))
            self._spent[arm] = (before[0] + steps, before[1] + seconds - (judging or 0.0))
            self._judged += [] if judging is None else [judging]

    def trained(self, arm: str, steps: int, seconds: float) -> None:
        """A run's steps are taken, in passes that it shared with others: `seconds` are its part of the time. It has
        ended when what comes behind them is done, too."""
        self.ended(arm, steps, seconds)
        self._trained.append((arm, steps))

    @property
    def has_spent(self) -> bool:
        """Whether a run has ended that was not there before."""
        return bool(self._spent)

    def drop(self, arm: str) -> None:
        """An arm has failed: what was planned of it is not done."""
        self.total_steps -= sum(steps for name, steps in self.left if name == arm)
        self.left = [run for run in self.left if run[0] != arm]
        self._trained = [run for run in self._trained if run[0] != arm]

    def seconds_left(self) -> float | None:
        """From what each method's steps took so far, and what judging and measuring took; None before any has ended."""
        if (mean := self._step()) is None:
            return None
        training = sum(steps * (self._step(arm) or mean) for arm, steps in self.left)
        judging = sum(self._judged) / len(self._judged) if self._judged else self.judging_seconds
        return training + judging * sum(steps == self.final_steps for _, steps in (*self.left, *self._trained))

    def seconds_behind(self, arm: str, steps: int) -> float | None:
        """What is left behind the steps of a run that is under way."""
        left, step = self.seconds_left(), self._step(arm) or self._step()
        return None if left is None or step is None else max(0.0, left - steps * step)

    def _step(self, arm: str | None = None) -> float | None:
        """Seconds of a step of this arm, or of all; None where none was run."""
        spent = [self._spent[arm]] if arm in self._spent else [] if arm is not None else list(self._spent.values())
        done = sum(steps for steps, _ in spent)
        if done:
            return sum(seconds for _, seconds in spent) / done
        return self.step_seconds if arm is None else None

    def __str__(self) -> str:
        share = self._finished / self.total_steps if self.total_steps else 1.0
        left = self.seconds_left()
        when = "" if left is None or not (self.left or self._trained) else f", about {duration(left)} left"
        return f"{100 * share:.0f}% of the budget done{when}"
