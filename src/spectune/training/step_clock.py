"""What steps take: wall and CPU seconds of each, without those in which the host prepared what comes next."""

from dataclasses import dataclass

from spectune.training.machine import Gauges


@dataclass
class Span:
    """When a step began and ended: wall and CPU seconds. Runs that take it together share one, which ends where the
    first of them looks at what it gave.

    Attributes:
        began: when the host was done with the data.
        ended: None while it runs.
        runs: that take it together, or whose steps pass between its beginning and its end: each has its part of the
            time.
    """

    began: tuple[float, float]
    ended: tuple[float, float] | None = None
    runs: int = 1


class StepClock:
    """Times the steps of one run."""

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges
        self._last_end = 0.0, 0.0

    def begin(self) -> Span:
        """A step begins now."""
        return Span(self._now())

    def took(self, span: Span) -> tuple[float, float]:
        """Wall and CPU seconds of a step that has ended. Behind another step it began when that one ended."""
        span.ended = span.ended or self._now()
        seconds, cpu = (end - max(begun) for end, *begun in zip(span.ended, span.began, self._last_end, strict=True))
        self._last_end = span.ended
        return seconds / span.runs, cpu / span.runs

    def _now(self) -> tuple[float, float]:
        return self._gauges.wall(), self._gauges.cpu()
