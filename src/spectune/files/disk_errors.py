"""A disk that is full, read-only or broken, however the library that met it words it, becomes one error of ours."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from spectune.errors import SpectuneError, WriteError, first_line

_FULL = "no space (or no inode) is left on its disk. Free some, or choose a folder on another disk"
_BROKEN = "its disk fails ({}). Look at the system's log, or choose a folder on another disk"
_REASONS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "your quota on its disk is used up. Free some of it, or choose a folder on another disk",
    errno.EROFS: "its disk is mounted read-only. Choose a folder on another disk",
    errno.EFBIG: "a file would be larger than its disk, or your limit (ulimit -f), lets a file be",
    errno.EIO: _BROKEN.format("input/output error"),
    errno.ENXIO: _BROKEN.format("no such device"),
    errno.ENODEV: _BROKEN.format("no such device"),
    errno.ESTALE: _BROKEN.format("stale file handle"),
}
#: what an OSError says well enough by itself, and the Rust libraries' plain exceptions do not
_DENIED = {errno.EACCES: "permission is denied", errno.EPERM: "it is not permitted"}
_RUST = re.compile(r"\(os error (\d+)\)")
#: numpy's `tofile`, which gguf writes with, knows no more than this
_SHORT = re.compile(r"\d+ requested and \d+ written")


@contextlib.contextmanager
def disk_errors(folder: str | Path, whole: str = "") -> Iterator[None]:
    """Around everything that writes into `folder`: OSError, safetensors' and tokenizers' own exceptions and whatever
    else a full, read-only or broken disk makes a library raise is raised as WriteError, which names the folder.

    Args:
        folder: what a user knows it as. The outermost of several names it.
        whole: what can be relied on then, as a sentence.

    Raises:
        WriteError: the disk failed. Everything else passes as it is.
    """
    before = sys.exception()
    try:
        yield
    except WriteError as error:
        known = " ".join(filter(None, dict.fromkeys((error.whole, whole))))
        raise WriteError(folder, error.reason, known) from error.__cause__
    except SpectuneError:
        raise
    except Exception as error:
        reason = _reason(error, before)
        if reason is None:
            raise
        raise WriteError(folder, reason, whole) from error


def _reason(error: BaseException | None, before: BaseException | None) -> str | None:
    """What the disk has to do with an error, or with what led to it inside the block; None: nothing."""
    seen: set[int] = set()
    while error is not None and error is not before and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _REASONS:
            return _REASONS[error.errno]
        if not isinstance(error, OSError) or error.errno is None:
            said = str(error)
            codes = [int(code) for code in _RUST.findall(said)]
            codes += [code for code in _REASONS if os.strerror(code) in said]
            if known := [reason for code in codes if (reason := (_REASONS | _DENIED).get(code))]:
                return known[0]
            if _SHORT.search(said):
                return f"{_FULL} ({first_line(error)})"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None
