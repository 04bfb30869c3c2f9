"""One process of several, from its first step to its last: who fails says so, and nobody waits for who is gone.

A process that fails posts a notice where torchrun keeps what its processes share. The first notice counts: whoever
posted it says what is wrong, all others end with its exit code. One that waits in a collective operation, which a CUDA
device never leaves by itself, is ended by a thread that reads the board.
"""

import contextlib
import datetime
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from spectune.errors import InterruptedRun, PeerFailedError, SpectuneError, first_line
from spectune.torchrun import Place
from spectune.training.distribution import shared_store
from spectune.training.interrupt import stopping_signals

_KEY = "spectune/failure"
#: the first process speaks for all where all fail alike: the others give it so many seconds
_FIRST = 1.0
#: seconds between two looks at the board, and those that a process has to end by itself once another has failed
_LOOKS_EVERY, _GRACE = 0.5, 5.0


@dataclass(frozen=True)
class Notice:
    """Which process failed first, in which words, and with which exit code."""

    rank: int
    message: str
    exit_code: int


class Board:
    """Where processes post that they have failed. Without torchrun there is none, and nobody hears of it."""

    def __init__(self, place: Place) -> None:
        self.place, self._key = place, f"{_KEY}/{place.attempt}"
        self._store: Store | None = None
        with contextlib.suppress(RuntimeError):  # torchrun itself is gone
            self._store = shared_store(place, datetime.timedelta(seconds=20))

    def read(self) -> Notice | None:
        """The first notice, None where there is none."""
        if self._store is None or not self._store.check([self._key]):
            return None
        return Notice(**json.loads(self._store.get(self._key)))

    def post(self, message: str, exit_code: int) -> Notice:
        """Say that this process has failed. Returns the notice that counts."""
        own = Notice(self.place.rank, message, exit_code)
        if self._store is None:
            return own
        try:
            if not self.place.leads:
                until = time.monotonic() + _FIRST  # where it takes longer it has not failed
                while time.monotonic() < until and not self._store.check([self._key]):
                    time.sleep(0.05)
            return Notice(**json.loads(self._store.compare_set(self._key, "", json.dumps(asdict(own)))))
        except RuntimeError:
            return own


class _Watch(threading.Thread):
    """Ends the process where another one has failed and it does not end by itself."""

    def __init__(self, place: Place) -> None:
        super().__init__(daemon=True, name="other-processes")
        self._board, self._over = Board(place), threading.Event()

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # torchrun is gone, and ends its processes
            while not self._over.wait(_LOOKS_EVERY):
                notice = self._board.read()
                if notice is not None and notice.rank != self._board.place.rank:
                    if not self._over.wait(_GRACE):
                        leave(notice.exit_code)
                    return

    def stop(self) -> None:
        self._over.set()


@contextlib.contextmanager
def membership() -> Iterator[None]:
    """Inside, this process is one of those that torchrun started: where it fails, all end, and the other way round. The
    process group that is made inside is destroyed at the end. Alone, or inside another membership, this does nothing.

    Raises:
        PeerFailedError: another process failed first.
    """
    place = Place.from_environment()
    if place.alone or dist.is_initialized() or any(isinstance(thread, _Watch) for thread in threading.enumerate()):
        yield
        return
    watch = _Watch(place)
    watch.start()
    try:
        yield
    except PeerFailedError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        with deaf():
            notice = Board(place).post(*described(error))
        if notice.rank != place.rank:
            raise PeerFailedError(notice.rank, notice.message, notice.exit_code) from error
        raise
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
    finally:
        watch.stop()


def described(error: BaseException) -> tuple[str, int]:
    """What is said of an error, and its exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", InterruptedRun.exit_code
    code = getattr(error, "exit_code", None)  # of a usage error too
    if code is not None:
        return str(error), int(code)
    return f"{type(error).__name__}: {first_line(error)}", SpectuneError.exit_code


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Inside, torchrun's SIGTERM, which follows at once where another process has ended, does not stop this one from
    saying why it ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in stopping_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(exit_code: int) -> NoReturn:
    """End the process at once: its way out may lead through a device that waits for a process that is gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(exit_code)


def tell_torchrun(message: str) -> None:
    """Put a message where torchrun takes it from for its own report of the processes that failed."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
