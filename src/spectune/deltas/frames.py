"""Which generators run now: a route that one of them has entered is its own, while several take turns on a thread."""

import inspect
import sys
from collections.abc import Iterator
from types import FrameType

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
#: what stands between a `with route(...)` and this: context managers are generators, too
_BETWEEN = (
    "contextlib", "spectune.deltas.frames", "spectune.deltas.forward_state", "spectune.deltas.routing",
    "spectune.deltas.slot_tables",
)  # fmt: skip


def running_generators() -> frozenset[int]:
    """The generators that run on this thread, by the ids of their frames, which hold for as long as they do."""
    return frozenset(id(frame) for frame in _frames() if frame.f_code.co_flags & _GENERATOR)


def calling_generator() -> int | None:
    """The generator that called (by way of context managers), by its frame's id; None where no generator did."""
    frame = next(_frames(), None)
    return None if frame is None or not frame.f_code.co_flags & _GENERATOR else id(frame)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") not in _BETWEEN:
            yield frame
        frame = frame.f_back
