"""Whether a folder takes what a run writes: room, speed with fsync, renames that replace."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from spectune.health.outcome import FAILED, OK, Outcome

#: below it the first checkpoints of a small model have no room
LEAST_FREE = 2**30
#: written, or so long
MOST_BYTES, MOST_SECONDS = 64 * 2**20, 1.0


def disk(name: str, folder: str, least_free: int = LEAST_FREE) -> Outcome:
    """A file written with fsync, and a rename over another one, in a folder or the nearest one above it that is there.
    Leaves nothing behind."""
    path = Path(folder).expanduser().absolute()
    existing = next(place for place in (path, *path.parents) if place.is_dir())
    advice = f"Choose another folder for it ({'--output-dir' if name == 'output-folder' else 'HF_HOME'})"
    block = os.urandom(4 * 2**20)
    try:
        free = shutil.disk_usage(existing).free
        with tempfile.TemporaryDirectory(prefix=".spectune-doctor-", dir=existing) as own:
            written, began = 0, time.perf_counter()
            with Path(own, "new").open("wb") as file:
                while written < MOST_BYTES and time.perf_counter() - began < MOST_SECONDS:
                    written += file.write(block)
                file.flush()
                os.fsync(file.fileno())
            seconds = time.perf_counter() - began
            Path(own, "old").write_bytes(b"old")
            os.replace(Path(own, "new"), Path(own, "old"))
            if Path(own, "old").stat().st_size != written or Path(own, "new").exists():
                return Outcome(name, FAILED, f"{path}: a rename did not replace the file that was there", advice)
            with Path(own, "old").open("rb") as file:
                if file.read(len(block)) != block:
                    return Outcome(name, FAILED, f"{path}: what was written reads back otherwise", advice)
    except OSError as error:
        return Outcome(name, FAILED, f"{path}: {error.strerror or error}", advice)
    says = (
        f"{path}: {free / 2**30:,.0f} GiB free, writes {written / seconds / 1e6:,.0f} MB/s with fsync, renames replace"
    )
    if free < least_free:
        return Outcome(name, FAILED, says, f"{advice}, or make room: {least_free / 2**30:.0f} GiB is little for a run")
    return Outcome(name, OK, says)
