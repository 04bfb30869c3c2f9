"""Where the time goes: seconds by phase, whose sum is the time that has passed."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import ParamSpec, TypeVar

#: in the order in which they are shown, each with what it is called
PHASES = {
    "load": "Load",
    "rows": "Read rows",
    "prove": "Prove",
    "plan": "Plan",
    "compile": "Compile",
    "steps": "Steps",
    "validation": "Validate",
    "judge": "Judge",
    "generate": "Generate",
    "forget": "Forgetting",
    "costs": "Costs",
    "save": "Save",
    "other": "Other",
}
OTHER = "other"
P = ParamSpec("P")
R = TypeVar("R")


class Phases:
    """A stopwatch that is always in one phase: the innermost one that was entered, "other" outside of all.

    Args:
        clock: seconds from some point on, such as `time.perf_counter`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = defaultdict[str, float](float)
        self._inside = [OTHER]
        self._since = clock()
        #: seconds that were counted here, and of these what was recorded
        self._counted = self._recorded = 0.0

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Inside, time is of this phase. One of `PHASES`."""
        assert phase in PHASES, phase
        self._charge()
        self._inside.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._inside.pop()

    def call(self, phase: str, function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """What the function gives, its time being of this phase."""
        with self.of(phase):
            return function(*arguments, **named)

    @contextlib.contextmanager
    def apart(self) -> Iterator["Phases"]:
        """A stopwatch for a part that is recorded by itself. What it has recorded by the end is left out here; the rest
        (all of it, where the part fails before) is counted here."""
        self._charge()
        part = Phases(self._clock)
        try:
            yield part
        finally:
            self._since += part._recorded

    def pause(self) -> None:
        """What passes from here to `go_on` is somebody else's."""
        self._charge()

    def go_on(self, worked: float = 0.0) -> None:
        """Count on, with so many of the seconds since `pause`."""
        self._since = max(self._since, self._clock() - worked)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what an earlier call took: of a run that goes on."""
        for phase, took in seconds.items():
            self._seconds[phase] += took

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count so much of one phase's time as another's, at most what it has."""
        self._charge()
        moved = min(seconds, self._seconds[source])
        self._seconds[source] -= moved
        self._seconds[target] += moved

    def record(self) -> dict[str, float]:
        """Seconds of each phase that took any, up to now."""
        self._charge()
        self._recorded = self._counted
        return {phase: self._seconds[phase] for phase in PHASES if self._seconds[phase] > 0}

    def _charge(self) -> None:
        now = self._clock()
        self._seconds[self._inside[-1]] += now - self._since
        self._counted += now - self._since
        self._since = now
