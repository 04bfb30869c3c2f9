"""What a run shows while it trains: a bar on a terminal, elsewhere a line every some seconds; and a line an epoch."""

import contextlib
import time
from collections.abc import Callable
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spectune.files.plain_console import above_bar, print_line
from spectune.files.plain_text import one_line
from spectune.sizes import duration

#: characters of a run's name beside its bar
LONGEST_LABEL = 60
#: seconds between two lines where there is no terminal
EVERY = 15.0


class Shows(Protocol):
    """What a run tells as it goes."""

    def step(self, loss: float, tokens_per_second: float) -> None:
        """A step was taken."""

    def say(self, line: str) -> None:
        """A line that stays."""


class Heartbeat:
    """When the next line is due: at once, then every so many seconds, over all runs that share it."""

    def __init__(self, every: float = EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self.clock = every, clock
        self._last: float | None = None

    def is_due(self) -> bool:
        """Whether a line is due now; it is taken to be written then."""
        now = self.clock()
        due = self._last is None or now - self._last >= self.every
        self._last = now if due else self._last
        return due


class Display:
    """Step, loss, tokens a second and time left; `say` prints a line above the bar.

    Args:
        total, done: steps of the run, and those that it begins after.
        heartbeat: of the lines, where there is no terminal; by default one of its own.
        behind: seconds of what comes after this run, None where nobody knows.
        says: False keeps `say` silent: of runs that are no more than a part of something.
    """

    def __init__(
        self, console: Console, label: str, total: int, done: int, *, heartbeat: Heartbeat | None = None,
        behind: Callable[[], float | None] | None = None, says: bool = True,
    ) -> None:  # fmt: skip
        self.console, self.total, self.says = console, total, says
        self.label = one_line(label, LONGEST_LABEL)
        self._heartbeat, self._behind = heartbeat or Heartbeat(), behind
        self._begun, self._done, self._first = self._heartbeat.clock(), done, done
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"), TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._above = contextlib.ExitStack()
        self._task = self._bar.add_task(self.label, total=total, completed=done, loss=float("nan"), rate=0.0)

    def __enter__(self) -> Self:
        self._bar.start()
        if not self._bar.disable:
            self._above.enter_context(above_bar(self.console))
        self._begun = self._heartbeat.clock()
        return self

    def __exit__(self, *_: object) -> None:
        self._above.close()
        self._bar.stop()

    def go_on_from(self, step: int) -> None:
        """The run begins after so many steps."""
        self._done = self._first = step
        self._bar.update(self._task, completed=step)

    def step(self, loss: float, tokens_per_second: float) -> None:
        """A step was taken."""
        self._done += 1
        self._bar.update(self._task, advance=1, loss=loss, rate=tokens_per_second)
        if not self.console.is_terminal and self._heartbeat.is_due():
            speed = f", {tokens_per_second:,.0f} tokens/s" if tokens_per_second else ""
            self._print(f"{self.label}: step {self._done} of {self.total}, loss {loss:.4f}{speed}{self._left()}")

    def say(self, line: str) -> None:
        if self.says:
            self._print(line)

    def _left(self) -> str:
        """The time left, by what steps have taken so far, all that is done between them included."""
        taken, left = self._done - self._first, self.total - self._done
        if taken < 2 or not left:  # the first step does what is done once
            return ""
        seconds = (self._heartbeat.clock() - self._begun) / taken * left
        after = None if self._behind is None else self._behind()
        return f", about {duration(seconds)} left" + ("" if after is None else f", {duration(seconds + after)} in all")

    def _print(self, line: str) -> None:
        print_line(self.console, line)
