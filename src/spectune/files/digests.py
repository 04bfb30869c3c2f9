"""What files were when they were written: their size and their SHA-256."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from spectune.errors import DataError
from spectune.files.regular import inside, opened

#: files that are read at once; hashing does not hold Python's lock
_AT_ONCE = 4


class Digest(BaseModel):
    """What a file was when it was written. In records as `{"bytes": 12, "sha256": "..."}` (`model_dump`)."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


def digest_of(path: str | Path) -> Digest:
    """A file as it is now. Raises OSError."""
    with Path(path).open("rb") as file:
        return _digest(file)


def check_files(folder: str | Path, digests: Mapping[str, Digest], cure: str) -> None:
    """Compare files with what they were when they were written; several are read at once.

    Args:
        digests: by name in the folder, or by path in it.
        cure: what to do, for the message's end.

    Raises:
        DataError: a file is missing, is no plain file, or is another one; all of them are listed.
    """
    folder = Path(folder)
    largest = sorted(digests.items(), key=lambda item: (-item[1].bytes, item[0]))  # first: the others fit in beside it
    with ThreadPoolExecutor(max_workers=min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda item: _apart(folder, *item), largest)
    problems = sorted(problem for problem in found if problem is not None)
    if problems:
        raise DataError(f"{folder}: files are not the ones that were written. {cure}", problems)


def _apart(folder: Path, name: str, written: Digest) -> str | None:
    if inside(folder, os.path.dirname(name)) is None:
        return f"{name!r}: leads out of the folder"
    try:
        with opened(folder / name) as file:
            if file is None:
                return f"{name}: is missing"
            if (size := os.fstat(file.fileno()).st_size) != written.bytes:
                return f"{name}: has {size:,} bytes, {written.bytes:,} were written"
            found = _digest(file)
    except DataError as error:
        return str(error)
    if found != written:
        return f"{name}: its SHA-256 is {found.sha256[:16]}..., {written.sha256[:16]}... was written"
    return None


def _digest(file: BinaryIO) -> Digest:
    found = hashlib.file_digest(file, "sha256").hexdigest()
    return Digest(bytes=file.tell(), sha256=found)
