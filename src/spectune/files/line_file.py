"""A file that grows by whole lines, by one process at a time: what is there is whole, whatever ends the process."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from spectune.errors import BusyFolderError, ConfigError
from spectune.files.disk_errors import disk_errors
from spectune.files.lock import Claim, NoLocksError
from spectune.files.syncing import make_folder, sync_folder

log = logging.getLogger("spectune")

#: bytes that are read at once to look for the last line's end
_BLOCK = 2**16


class LineFile:
    """An open file of lines. A line is there as a whole or not at all.

    Attributes:
        path: as the user named it.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self._size = os.fstat(descriptor).st_size

    def lines(self) -> Iterator[bytes]:
        """The lines that are there, without their ends."""
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            for line in file:
                yield line.rstrip(b"\n")

    def write(self, line: str) -> None:
        """Put a line at the end. Raises WriteError: the disk is full or broken; nothing of it is there then."""
        content = memoryview(line.encode() + b"\n")
        place = self._size
        with disk_errors(self.path, "The lines before are whole: go on with --resume."):
            try:
                while content:
                    done = os.pwrite(self._descriptor, content, place)
                    content, place = content[done:], place + done
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._size)
                raise
        self._size = place

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)

    def drop_part(self) -> None:
        """Take away what stands behind the last line's end."""
        size = end = self._size
        while end > 0:
            start = max(0, end - _BLOCK)
            found = os.pread(self._descriptor, end - start, start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._descriptor, end)
            self._size = end


@contextlib.contextmanager
def line_file(path: str | Path, *, resume: bool, begins: bytes) -> Iterator[LineFile]:
    """Have a file of lines for oneself, to write at its end.

    Args:
        resume: go on in what is there. Part of a line at its end, which a writer that was killed left, is taken away.
        begins: how all that is written to such a file begins; nothing else is gone on in.

    Raises:
        ConfigError: it is there already and holds something, or is no file that may be gone on in.
        BusyFolderError: another process writes it.
        WriteError: it cannot be made.
    """
    named = Path(path)
    place = Path(os.path.realpath(named))
    _check_place(named, place)
    new = not place.exists()
    with disk_errors(named):
        make_folder(place.parent)
        claim = _claimed(named, place)
    try:
        there = os.pread(claim.descriptor, len(begins), 0)
        if there and not resume:
            raise ConfigError(f"--output {named} is there already: go on in it with --resume, or choose another name")
        if there != begins[: len(there)]:
            raise ConfigError(f"--output {named} was not written by this command: choose another name")
        file = LineFile(named, claim.descriptor)
        file.drop_part()
        if new:
            sync_folder(place.parent)
        yield file
        file.sync()
    finally:
        claim.release(remove=new and not os.fstat(claim.descriptor).st_size)


def _check_place(named: Path, place: Path) -> None:
    try:
        mode = os.stat(place).st_mode
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise ConfigError(f"--output {named} is in a file; expected a name in a folder") from None
    if not stat.S_ISREG(mode):
        raise ConfigError(f"--output {named} is no plain file; expected the name of a file")
    if not os.access(place, os.R_OK | os.W_OK):
        raise ConfigError(f"--output {named} may not be read and written by you: choose another name")


def _claimed(named: Path, place: Path) -> Claim:
    try:
        claim = Claim.on(place, make=True)
    except NoLocksError:
        log.warning("the file system of %s has no locks: that two processes write it is not noticed", named)
        return Claim(place, os.open(place, os.O_RDWR | os.O_CREAT, 0o666))
    if claim is None:
        raise BusyFolderError(f"--output {named} is in use: another process writes it. Wait until it has ended")
    return claim
