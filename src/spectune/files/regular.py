"""Files that anybody may have put there: only regular ones are opened, and no more is read than was agreed."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from spectune.errors import DataError

_COPY = "copy the folder again from where it was written"


def plain_file(path: Path, *, links: bool = False) -> bool:
    """Whether there is a file at `path`.

    Args:
        links: of a file that the user named: it may be a link to anywhere.

    Raises:
        DataError: what is there is no regular file, or a link that leads nowhere, in a circle or out of its folder
            (into the blobs of the hub's cache is allowed: that is how the cache stores every file).
    """
    cure = "" if links else f"; {_COPY}"
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise DataError(f"{path} is a link to {os.readlink(path)}, where there is nothing{cure}") from None
        return False
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} cannot be looked at: {error}{cure}") from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is {_kind(mode)}, expected a file{cure}")
    target = os.path.realpath(path)
    inside = links or any(os.path.commonpath([target, root]) == root for root in _roots(path.parent))
    if path.is_symlink() and not inside:
        raise DataError(
            f"{path} is a link to {target}, outside of its folder: refused. Put the file itself there if it is meant."
        )
    return True


@contextlib.contextmanager
def opened(path: Path, *, links: bool = False) -> Iterator[BinaryIO | None]:
    """A regular file, open to be read; None where there is none. Never waits for a pipe. Raises DataError as
    `plain_file`; or it cannot be read."""
    if not plain_file(path, links=links):
        yield None
        return
    try:
        # not blocking: between the look and the opening something else may have come there
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode):
                raise DataError(f"{path} is {_kind(mode)}, expected a file")
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def read_bounded(path: Path, most: int, *, links: bool = False) -> bytes | None:
    """What a file holds; None where there is none. Never reads more than `most` bytes.

    Raises:
        DataError: as `opened`; or it is longer.
    """
    with opened(path, links=links) as file:
        if file is None:
            return None
        size = os.fstat(file.fileno()).st_size
        # a file may say that it has no bytes and go on for ever, as those of /proc do
        content = b"" if size > most else file.read(most + 1)
    if (size := max(size, len(content))) > most:
        raise DataError(f"{path} has {size:,} bytes or more; at most {most:,} are read of such a file: it is damaged")
    return content


def inside(folder: Path, path: object) -> Path | None:
    """A path that a file names, within `folder`; None where it is no text, or leads out of it, by links too."""
    if not isinstance(path, str) or "\0" in path:
        return None
    try:
        root, found = os.path.realpath(folder), os.path.realpath(folder / path)
    except (OSError, ValueError):
        return None
    return Path(found) if os.path.commonpath([root, found]) == root else None


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"


def _roots(folder: Path) -> list[str]:
    """Folders that links in `folder` may lead to: itself, and for a snapshot of the hub's cache the blobs beside it."""
    own = os.path.realpath(folder)
    caches = [parent.parent for parent in Path(own).parents if parent.name == "snapshots"]
    return [own, *(str(cache / "blobs") for cache in caches[:1])]
