"""Ctrl-C and SIGTERM: finish the step, write a checkpoint, say how to go on."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class Interrupts:
    """Inside the `with`, the first signal only sets `requested`; a second Ctrl-C stops at once.

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
            for number in (signal.SIGINT, signal.SIGTERM):
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
