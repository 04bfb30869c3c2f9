"""What a comparison has still to do: stated before it starts, and as it goes."""

from dataclasses import dataclass, field


@dataclass
class Budget:
    """Planned and finished work in optimizer steps; every step has the same number of rows for every method.

    Attributes:
        left: (arm, steps) of each run that has not ended.
        step_seconds: a first guess, from a few steps of one method.
    """

    left: list[tuple[str, int]]
    step_seconds: float | None = None
    _spent: dict[str, tuple[int, float]] = field(default_factory=dict)
    _finished: int = 0

    def __post_init__(self) -> None:
        self.total_steps = sum(steps for _, steps in self.left)

    def ended(self, arm: str, steps: int, seconds: float | None) -> None:
        """A run has ended; `seconds` is None where an earlier call made it, whose time is not known."""
        if (arm, steps) in self.left:
            self.left.remove((arm, steps))
        else:  # an extension of the search, which was not planned
            self.total_steps += steps
        self._finished += steps
        if seconds is not None:
            before = self._spent.get(arm, (0, 0.0))
            self._spent[arm] = (before[0] + steps, before[1] + seconds)

    @property
    def has_spent(self) -> bool:
        """Whether a run has ended that was not there before."""
        return bool(self._spent)

    def drop(self, arm: str) -> None:
        """An arm has failed: what was planned of it is not done."""
        self.total_steps -= sum(steps for name, steps in self.left if name == arm)
        self.left = [run for run in self.left if run[0] != arm]

    def seconds_left(self) -> float | None:
        """From what each method's steps took so far, evaluation and measuring included; None before any has ended."""
        done = sum(steps for steps, _ in self._spent.values())
        mean = sum(seconds for _, seconds in self._spent.values()) / done if done else self.step_seconds
        if mean is None:
            return None
        pace = {arm: seconds / steps for arm, (steps, seconds) in self._spent.items()}
        return sum(steps * pace.get(arm, mean) for arm, steps in self.left)

    def __str__(self) -> str:
        share = self._finished / self.total_steps if self.total_steps else 1.0
        left = self.seconds_left()
        when = "" if left is None or not self.left else f", about {duration(left)} left"
        return f"{100 * share:.0f}% of the budget done{when}"


def duration(seconds: float) -> str:
    """35 s, 4 min, 2 h 10 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
