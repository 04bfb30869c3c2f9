"""A limit to the time that a chat template takes, whatever it does with it: the last resort behind the counts.

A thread looks at the clock of the thread that renders, and has an exception raised in it. It reaches everything but one
single long operation in C, and what goes into such an operation is limited by size.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from spectune.data.chats.template_meter import TemplateLimitError

Made = TypeVar("Made")
#: of the rendering thread's own time; the most that a count lets through takes a tenth of it
SECONDS = 5.0
_TICK = 0.25
#: ticks without any rendering after which the thread ends
_IDLE = 40


class _ExpiredError(BaseException):
    pass


@functools.cache
def the_watch() -> TemplateWatch:
    """That of a process, whose one thread looks at all renderings: there may be a template for each row."""
    return TemplateWatch()


if hasattr(os, "register_at_fork"):  # behind a fork there is neither the thread nor whatever other threads rendered
    os.register_at_fork(after_in_child=the_watch.cache_clear)


class TemplateWatch:
    """Renderings under watch, the innermost of each thread."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        #: whether the thread is about to raise something: only then is its lock waited for
        self._raising = False
        self._numbers = itertools.count()
        #: by thread, the number of its rendering
        self._running: dict[int, int] = {}
        self._expired: set[int] = set()
        self._asleep = True

    def run(self, work: Callable[..., Made], *given: Any) -> Made:
        """What `work` gives. Raises TemplateLimitError: it took too long."""
        here = threading.get_ident()
        outer = self._running.get(here)
        number = self._running[here] = next(self._numbers)
        if self._asleep:
            self._begin()
        try:
            try:
                return work(*given)
            finally:
                self._leave(here, outer)  # from here on nothing is raised for it, but for what is on its way
                if self._raising or self._expired:
                    self._forget(here, number)
        except _ExpiredError:
            self._leave(here, outer)
            self._forget(here, number)
            raise TemplateLimitError(f"takes more than {self.seconds:g} seconds for one conversation") from None

    def _leave(self, thread: int, outer: int | None) -> None:
        """Watch again what a rendering was a part of, if it was."""
        if outer is None:
            self._running.pop(thread, None)
        else:
            self._running[thread] = outer

    def _begin(self) -> None:
        self._asleep = False
        threading.Thread(target=self._look, name="template watch", daemon=True).start()

    def _forget(self, thread: int, number: int) -> None:
        """Take back an exception that has not been raised yet."""
        with self._lock:
            if number in self._expired:
                self._expired.discard(number)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)

    def _look(self) -> None:
        seen: dict[int, tuple[int, float]] = {}
        idle, last = 0, -1
        while idle < _IDLE:
            time.sleep(min(_TICK, self.seconds / 4))
            running = dict(self._running)
            newest = max(running.values(), default=last)
            idle, last = 0 if running or newest != last else idle + 1, newest
            for thread, number in running.items():
                self._raising = True
                with self._lock:
                    if self._running.get(thread) == number and number not in self._expired:  # then the thread lives
                        before, begun = seen.get(thread, (-1, 0.0))
                        if before != number:
                            seen[thread] = number, _seconds_of(thread)
                        elif _seconds_of(thread) - begun > self.seconds:
                            self._expired.add(number)
                            expired = ctypes.py_object(_ExpiredError)
                            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), expired)
                self._raising = False
        self._asleep = True
        if self._running:  # it came after the last look, and before this was known
            self._begin()


def _seconds_of(thread: int) -> float:
    """The clock of a living thread; that of the world where there is no such one."""
    with contextlib.suppress(AttributeError, OSError):
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return time.monotonic()
