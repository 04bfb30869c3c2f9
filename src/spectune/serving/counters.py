"""What a server has done and is doing, in the text format that Prometheus reads."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
Labels = tuple[tuple[str, str], ...]


class Counters:
    """Counts, durations, and gauges that are read when they are asked for. Any thread may use it.

    No label has a value that a client chooses, so that what is kept does not grow.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[Labels]] = defaultdict(Counter)
        self._durations: dict[str, tuple[list[int], list[float]]] = {}
        self._gauges: dict[str, Callable[[], float]] = {}
        self._helps: dict[str, str] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        with self._lock:
            self._counts[name][tuple(sorted(labels.items()))] += amount  # type: ignore[assignment]

    def took(self, name: str, seconds: float) -> None:
        with self._lock:
            buckets, total = self._durations.setdefault(name, ([0] * (len(_SECONDS) + 1), [0.0]))
            buckets[bisect_left(_SECONDS, seconds)] += 1
            total[0] += seconds

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        self._gauges[name] = read

    def describe(self, **helps: str) -> None:
        """Names with what they count; each stands in the text from the beginning, with nothing counted yet."""
        self._helps |= helps

    def text(self) -> str:
        """It waits for what gauges wait for: not for the event loop's thread."""
        gauges = {name: read() for name, read in self._gauges.items()}  # before the lock, which nobody waits long for
        with self._lock:
            return "".join(f"{line}\n" for line in self._lines(gauges))

    def _lines(self, gauges: Mapping[str, float]) -> Iterator[str]:
        for name, says in self._helps.items():
            yield f"# HELP spectune_{name} {says}"
            if name in gauges:
                yield f"# TYPE spectune_{name} gauge"
                yield f"spectune_{name} {gauges[name]:g}"
            elif name.endswith("_seconds"):
                yield f"# TYPE spectune_{name} histogram"
                yield from self._histogram(name)
            else:
                yield f"# TYPE spectune_{name} counter"
                for labels, amount in sorted(self._counts[name].items()):
                    inside = ",".join(f'{key}="{value}"' for key, value in labels)
                    yield f"spectune_{name}{{{inside}}} {amount:g}" if inside else f"spectune_{name} {amount:g}"

    def _histogram(self, name: str) -> Iterator[str]:
        buckets, total = self._durations.get(name, ([0] * (len(_SECONDS) + 1), [0.0]))
        below = 0
        for edge, amount in zip((*map(str, _SECONDS), "+Inf"), buckets, strict=True):
            below += amount
            yield f'spectune_{name}_bucket{{le="{edge}"}} {below}'
        yield f"spectune_{name}_sum {total[0]:g}"
        yield f"spectune_{name}_count {below}"
