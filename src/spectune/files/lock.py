"""One process in a folder at a time: advisory locks that die with their process."""

import contextlib
import datetime
import errno
import functools
import json
import logging
import os
import shlex
import socket
import stat
import sys
import time
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from spectune.errors import BusyFolderError, ConfigError
from spectune.files.disk_errors import disk_errors
from spectune.files.plain_text import one_line
from spectune.files.syncing import make_folder
from spectune.torchrun import Place

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("spectune")

#: in a folder that is worked in; nobody else's file has this name in a folder of ours
LOCK_FILE = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL}
#: bytes of a lock's file that are read, and characters of each part that are shown: anybody may have written it
_MOST, _SHOWN = 8192, 300
#: by process, device and inode: the locks that the running code is inside of. A thread has its own
_INSIDE: ContextVar[frozenset[tuple[int, int, int]]] = ContextVar("spectune_inside_locks", default=frozenset())


class NoLocksError(Exception):
    """The file system has no locks: who lives cannot be told."""


@dataclass(eq=False)
class Claim:
    """A locked file. The lock belongs to the process that took it, and ends with it, whatever else happens."""

    path: Path
    descriptor: int
    process: int = field(default_factory=os.getpid)

    @classmethod
    def on(cls, path: Path, *, make: bool) -> "Claim | None":
        """Lock the file at `path`; None: another process, or another place in this one, has it. It is not waited for.

        Raises:
            NoLocksError: nobody can tell.
            OSError: no such file, or it cannot be made.
            ConfigError: there is something else than a file of that name.
        """
        if fcntl is None:
            raise NoLocksError
        while True:
            descriptor = _open(path, make)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(path, descriptor):  # else who had it before has just removed it
                    return cls(path, descriptor)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError as error:
                os.close(descriptor)
                if error.errno in _NO_LOCKS:
                    raise NoLocksError from error
                raise
            os.close(descriptor)

    @property
    def key(self) -> tuple[int, int, int]:
        found = os.fstat(self.descriptor)
        return self.process, found.st_dev, found.st_ino

    def release(self, *, remove: bool) -> None:
        """Give the lock up; `remove`: and take its file away, first, so that nobody locks a file that goes then. In a
        process that was forked off meanwhile nothing is done: the lock is its parent's."""
        if os.getpid() != self.process:
            return
        with contextlib.suppress(OSError):
            if remove and _is_at(self.path, self.descriptor):
                self.path.unlink()
        self.forget()

    def forget(self) -> None:
        """Close the file. Of several processes that have it open by a fork, the lock lives as long as the last."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _open(path: Path, make: bool) -> int:
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | (os.O_CREAT if make else 0), 0o666)
    except PermissionError:  # another user's: it can be locked, and read, all the same
        descriptor = os.open(path, flags & ~os.O_RDWR | os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise ConfigError(f"{path} is no plain file, expected the file of a lock: remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path} is no plain file, expected the file of a lock: remove it")
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that has the name now."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def folder_lock(folder: str | Path, doing: str) -> Iterator[None]:
    """Have a folder for oneself: while this process lives and is inside, no other one gets in.

    The lock is on the file `.lock` in the folder, which says who has it, and goes with the lock; one that a dead
    process left is taken over. A folder that is not there is made, and taken away again where it stayed empty. Inside,
    the same folder may be locked again; by the same thread, that is. Of the processes that torchrun started the first
    one locks. Where the file system has no locks, the log says so, once, and nothing is kept out.

    Args:
        doing: what is done there, for who is refused: "spectune train".

    Raises:
        BusyFolderError: another process has it. At once: nothing is waited for.
        WriteError: the disk is full, read-only or broken.
        ConfigError: `.lock` is something else than a file, or the folder something else than a folder.
    """
    if not Place.from_environment().leads:
        yield
        return
    folder = Path(folder)
    made = not folder.exists()
    try:
        claim = _claim(folder)
    except NoLocksError:
        _say_no_locks(os.stat(folder).st_dev, str(folder))
        yield
        return
    if claim is None:
        yield
        return
    os.register_at_fork(after_in_child=functools.partial(_forget, weakref.ref(claim)))
    _sign(claim, doing)
    token = _INSIDE.set(_INSIDE.get() | {claim.key})
    try:
        yield
    finally:
        _INSIDE.reset(token)
        claim.release(remove=True)
        if made and os.getpid() == claim.process:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _forget(claim: weakref.ref[Claim]) -> None:
    """In a child that was forked off: it would hold its parent's lock for as long as it lives."""
    if (held := claim()) is not None:
        held.forget()


def _claim(folder: Path) -> Claim | None:
    """None: the caller is inside the lock already. Raises BusyFolderError."""
    path = folder / LOCK_FILE
    for attempt in range(100):
        try:
            with disk_errors(folder):
                make_folder(folder)
                claim = Claim.on(path, make=True)
        except FileNotFoundError:  # who had it before found the folder empty, and removed it
            continue
        except (FileExistsError, NotADirectoryError) as error:
            if isinstance(error, FileExistsError) and (folder.is_dir() or not folder.exists()):
                continue  # who had it before removed it between our finding it there and seeing what it is
            raise ConfigError(f"{folder} is a file, or in one; expected a folder") from error
        if claim is not None:
            return claim
        with contextlib.suppress(OSError):
            found = os.stat(path, follow_symlinks=False)
            if (os.getpid(), found.st_dev, found.st_ino) in _INSIDE.get():
                return None
            if (owner := _owner(path)) is not None or attempt > 20:
                raise BusyFolderError(f"{folder} is in use: {owner or 'another process has locked it'}. {_CURE}")
        time.sleep(0.01)  # it has just been locked, and not signed yet; or released
    raise BusyFolderError(f"{folder} is in use: other processes lock it again and again. {_CURE}")


_CURE = "Wait until it has ended, or choose another folder"


def _sign(claim: Claim, doing: str) -> None:
    """Say who has the lock. That it is held does not depend on it."""
    owner = {
        "pid": claim.process,
        "host": socket.gethostname(),
        "doing": doing,
        "command": shlex.join(sys.argv),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):  # a full disk is said by what is to be written there
        os.ftruncate(claim.descriptor, 0)
        os.pwrite(claim.descriptor, (json.dumps(owner) + "\n").encode(), 0)


def _owner(path: Path) -> str | None:
    """What the file of a lock says of who has it, in words; None: nothing that could be read."""
    descriptor = _open(path, make=False)
    try:
        said = json.loads(os.read(descriptor, _MOST))
        parts = {key: one_line(str(said[key]), _SHOWN) for key in ("pid", "host", "doing", "command", "since")}
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    finally:
        os.close(descriptor)
    return "{doing} has it, process {pid} on {host}, since {since} ({command})".format(**parts)


@functools.cache
def _say_no_locks(device: int, folder: str) -> None:
    log.warning(
        "the file system of %s has no locks (flock): that two processes write into one folder there is not noticed",
        folder,
    )
