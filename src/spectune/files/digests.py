"""What files were when they were written: their size, and a hash of their content.

SHA-256 for what is handed on (a delta's folder): it can be published, and nobody can make another file of it. XXH3 with
128 bits for what stays where it was written (checkpoints): it notices every accident, fifteen times as fast.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field, model_validator

from spectune.errors import DataError
from spectune.files.regular import inside, opened

#: files that are read at once; hashing does not hold Python's lock
_AT_ONCE = 4
_CHUNK = 2**20


class Digest(BaseModel):
    """What a file was when it was written. In records as `{"bytes": 12, "sha256": "..."}` (`record`)."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    bytes: int = Field(ge=0)
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    xxh3_128: str | None = Field(default=None, pattern="^[0-9a-f]{32}$")

    @model_validator(mode="after")
    def _has_one_hash(self) -> Self:
        if (self.sha256 is None) is (self.xxh3_128 is None):
            raise ValueError("expected either sha256 or xxh3_128")
        return self

    @property
    def handed_on(self) -> bool:
        return self.sha256 is not None

    def record(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class Hashing:
    """A file's content as it goes by. `handed_on`: by SHA-256."""

    def __init__(self, *, handed_on: bool) -> None:
        self._handed_on = handed_on
        self._hash: Any = hashlib.sha256() if handed_on else xxhash.xxh3_128()
        self._bytes = 0

    def update(self, content: memoryview | bytes) -> None:
        self._hash.update(content)
        self._bytes += len(content)

    def digest(self) -> Digest:
        name = "sha256" if self._handed_on else "xxh3_128"
        return Digest.model_validate({"bytes": self._bytes, name: self._hash.hexdigest()})


def digest_of(path: str | Path, *, handed_on: bool = True) -> Digest:
    """A file as it is now. Raises OSError."""
    with Path(path).open("rb") as file:
        return _digest(file, handed_on=handed_on)


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
            found = _digest(file, handed_on=written.handed_on)
    except DataError as error:
        return str(error)
    if found != written:
        now, before = (str(digest.sha256 or digest.xxh3_128)[:16] for digest in (found, written))
        return f"{name}: its {'SHA-256' if found.handed_on else 'XXH3'} is {now}..., {before}... was written"
    return None


def _digest(file: io.BufferedReader, *, handed_on: bool) -> Digest:
    found, buffer = Hashing(handed_on=handed_on), memoryview(bytearray(_CHUNK))
    while size := file.raw.readinto(buffer):
        found.update(buffer[:size])
    return found.digest()
