"""Ctrl-C, SIGTERM, and SIGHUP, by which a terminal that is closed ends what runs in it: finish the step, write a
checkpoint, say how to go on."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from spectune.errors import InterruptedRun


def stopping_signals() -> list[signal.Signals]:
    """What asks a run to stop. Not SIGHUP where that is ignored, as nohup wants it; Windows has none."""
    found = [signal.SIGINT, signal.SIGTERM]
    hangup: signal.Signals | None = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        found.append(hangup)
    return found


def end_at_once() -> None:
    """All is written and said, and the process is ending: a signal from now on ends it, without a traceback of whatever
    is cleared away just then."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in stopping_signals():
        signal.signal(number, lambda *_: os._exit(InterruptedRun.exit_code))


class Interrupts:
    """Inside the `with`, the first signal only sets `requested`; a second one stops at once.

    Signals can only be caught in the main thread; elsewhere this does nothing.

    Args:
        alone: there is one process. Several stop where all know of it (`agree`), after the same step.
    """

    def __init__(self, alone: bool = True) -> None:
        self.requested: str | None = None
        self._alone = alone
        self._agreed: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in stopping_signals():
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def decided(self) -> str | None:
        """What the run stops for: the signal's name."""
        return self.requested if self._alone else self._agreed

    def agree(self, requests: float) -> None:
        """So many processes have had a signal by a step that all of them have taken."""
        if requests:
            self._agreed = self.requested or "interrupted"

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Inside, what must not stop half-way: a signal that comes meanwhile is answered at the end, as it would have been
    at once. In another thread than the main one, which signals never interrupt, this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in stopping_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for again in came:
            signal.raise_signal(again)
