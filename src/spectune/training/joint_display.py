"""What runs show that are trained together: one bar, and each one's lines under its name."""

import contextlib
from collections.abc import Sequence
from typing import Self

from rich.console import Console

from spectune.training.display import Display, Shows


class JointDisplay(contextlib.AbstractContextManager["JointDisplay"]):
    """One bar for the steps of all runs.

    Args:
        runs: of each its name, the steps it has in all, and those that are done.
        display: the bar; by default one on the console.
    """

    def __init__(self, console: Console, runs: Sequence[tuple[str, int, int]], display: Display | None = None) -> None:
        total, done = sum(run[1] for run in runs), sum(run[2] for run in runs)
        label = runs[0][0] if len(runs) == 1 else f"{len(runs)} runs together"
        self._display = display or Display(console, label, total, done)
        self._rates = dict.fromkeys((run[0] for run in runs), 0.0)
        self._done = done

    def __enter__(self) -> Self:
        self._display.go_on_from(self._done)
        self._display.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._display.__exit__(*error)

    def of(self, name: str) -> Shows:
        """What one of the runs tells."""
        return _Part(self, name)

    def step(self, name: str, loss: float, tokens_per_second: float) -> None:
        """A run has taken a step, at so many of its own tokens a second."""
        self._rates[name] = tokens_per_second
        self._display.step(loss, sum(self._rates.values()))

    def say(self, line: str) -> None:
        """A line that stays."""
        self._display.say(line)


class _Part:
    """One run's part of the display."""

    def __init__(self, whole: JointDisplay, name: str) -> None:
        self.whole, self.name = whole, name

    def step(self, loss: float, tokens_per_second: float) -> None:
        self.whole.step(self.name, loss, tokens_per_second)

    def say(self, line: str) -> None:
        self.whole.say(f"{self.name}: {line}")
