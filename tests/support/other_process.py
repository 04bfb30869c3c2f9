"""Another process that works in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from spectune.files.lock import folder_lock


@contextlib.contextmanager
def other_process_in(folder: Path, doing: str = "spectune train") -> Iterator[int]:
    """Inside, a forked process has the folder's lock. Gives its number."""
    ready, done = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        try:
            with folder_lock(folder, doing):
                os.write(ready[1], b"x")
                os.close(done[1])
                os.read(done[0], 1)
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    try:
        yield child
    finally:
        for descriptor in (*done, *ready):
            os.close(descriptor)
        os.waitpid(child, 0)
