"""Which threads are in a forward pass of a model: what changes the model waits for their ends, and holds new ones back.

Hooks, children and attention functions are exchanged while nobody runs through them, whoever shares the model.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

#: seconds between two looks at threads that may have been torn out of a pass
_LOOK = 0.05


class RunningPasses:
    """The passes of one model, and the thread that changes it. What compiled or recorded code runs is not seen."""

    #: it hooks the model, and the decoder as well: a loss that calls the decoder by itself leaves nothing out
    only_counts = True

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._depths: dict[int, int] = {}  # of passes inside of each other, by thread
        self._alone: int | None = None  # the thread that changes the model
        self._times = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return RunningPasses, ()

    def begin(self, *_: object) -> None:
        """A pass begins on this thread; it waits where another one changes the model. A hook before a module."""
        if torch.compiler.is_compiling():
            return
        me = threading.get_ident()
        with self._changed:
            while self._alone not in (None, me) and me not in self._depths:
                self._changed.wait()
            self._depths[me] = self._depths.get(me, 0) + 1

    def end(self, *_: object) -> None:
        """The inverse of `begin`; harmless where a pass ended before it began. A hook after a module."""
        if torch.compiler.is_compiling():
            return
        me = threading.get_ident()
        with self._changed:
            left = self._depths.pop(me, 0) - 1
            if left > 0:
                self._depths[me] = left
            elif self._alone is not None:
                self._changed.notify_all()

    @contextlib.contextmanager
    def none_running(self) -> Iterator[None]:
        """Inside, no other thread is in a pass. A thread that is in one itself must not wait for another one that wants
        the same."""
        me = threading.get_ident()
        with self._changed:
            while self._alone not in (None, me):
                self._changed.wait()
            self._alone, self._times = me, self._times + 1
            try:
                while any(other != me for other in self._depths):
                    if not self._changed.wait(_LOOK):
                        self._forget_torn()
            except BaseException:
                self._leave()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._leave()

    def _leave(self) -> None:
        self._times -= 1
        if not self._times:
            self._alone = None
        self._changed.notify_all()

    def _forget_torn(self) -> None:
        """Ctrl-C tears a thread out of a pass without a hook being called."""
        frames = sys._current_frames()
        for thread in list(self._depths):
            frame = frames.get(thread)
            while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
                frame = frame.f_back
            if frame is None:
                del self._depths[thread]
