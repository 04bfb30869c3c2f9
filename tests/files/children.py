"""Processes that cost a fork, and full disks that need no right."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Child:
    """A fork of this process that calls `work` and ends: 0, or 1 where it raised. `ready()` inside `work` lets the
    parent go on from `wait_until_ready`; `wait()` there is for ever."""

    work: Callable[[Child], object]
    pid: int = field(init=False)

    def __post_init__(self) -> None:
        self._read, self._write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's threads do nothing in the child
            self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self.work(self)
                code = 0
            finally:
                os._exit(code)
        os.close(self._write)

    def ready(self) -> None:
        os.write(self._write, b"!")

    @staticmethod
    def wait() -> None:
        signal.pause()

    def wait_until_ready(self) -> Child:
        assert os.read(self._read, 1) == b"!", "the child died"
        return self

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.join()

    def join(self) -> int:
        os.close(self._read)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Every library that writes a longer file meets EFBIG, from the system itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
