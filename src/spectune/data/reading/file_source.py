"""Records of one file, by its suffix."""

import difflib
import itertools
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from spectune.data.reading.csv_source import csv_records
from spectune.data.reading.json_source import json_lines_records, json_records
from spectune.data.reading.limits import BYTES_A_ROW, ROWS, check_regular
from spectune.data.reading.raw_records import Record
from spectune.data.reading.table_source import arrow_records, parquet_records
from spectune.data.reading.text_source import text_records
from spectune.data.reading.text_stream import PACKED
from spectune.errors import DataError

#: by suffix, the kind of file
KINDS = {
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".feather": "Arrow",
    ".txt": "text",
    ".md": "text",
}
#: kinds that are packed in themselves
_TABLES = ("Parquet", "Arrow")
#: files beside a missing one that are looked at
_LOOKED_AT = 10_000
KNOWN = ", ".join(KINDS) + "; text formats also packed, with .gz or .zst behind"


def suffix_of(path: Path) -> str:
    """`.jsonl` of `a.jsonl`, `.jsonl.gz` of `a.jsonl.gz`; in small letters."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last in PACKED else last


def kind_of(path: Path) -> str | None:
    """The kind of a data file; None for what is none."""
    suffix = suffix_of(path)
    unpacked = Path(suffix).stem if suffix.count(".") == 2 else suffix
    kind = KINDS.get(unpacked)
    return None if kind in _TABLES and unpacked != suffix else kind


def file_records(
    path: Path, *, delimiter: str | None = None, encoding: str | None = None, known: Collection[str] = ()
) -> Iterator[Record]:
    """`(origin, record)` for each record of a file. Raises DataError: the file as a whole cannot be read."""
    check_regular(path)
    most = max(ROWS, os.stat(path).st_size // BYTES_A_ROW)
    for number, record in enumerate(_records(path, delimiter=delimiter, encoding=encoding, known=known)):
        if number == most:
            raise DataError(
                f"{path}: more than {most:,} rows in a file of {os.stat(path).st_size:,} bytes; expected at least "
                f"{BYTES_A_ROW} bytes a row: it is the same row again and again, or damaged"
            )
        yield record


def _records(path: Path, *, delimiter: str | None, encoding: str | None, known: Collection[str]) -> Iterator[Record]:
    kind = kind_of(path)
    if kind == "JSON lines":
        return json_lines_records(path, encoding)
    if kind == "JSON":
        return json_records(path, encoding, known)
    if kind == "CSV":
        return csv_records(path, encoding, delimiter=delimiter, known=known)
    if kind == "text":
        return text_records(path, encoding)
    if kind in _TABLES:
        return parquet_records(path) if kind == "Parquet" else arrow_records(path)
    suffix = suffix_of(path)
    if (inside := KINDS.get(Path(suffix).stem)) in _TABLES:
        raise DataError(f"{path}: {inside} is packed in itself, and not read out of {path.suffix}; unpack the file")
    raise DataError(f"{path}: unknown kind of file {suffix!r}; expected one of {KNOWN}")


def near(path: Path) -> str:
    """` (did you mean train.jsonl?)`: the data files beside a missing one that are named most like it."""
    try:
        with os.scandir(path.parent) as entries:
            some = itertools.islice(entries, _LOOKED_AT)
            names = [entry.name for entry in some if kind_of(Path(entry.name)) is not None and entry.is_file()]
    except (OSError, ValueError):
        return f" (there is no folder {path.parent} either)"
    alike = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f" (did you mean {', '.join(str(path.parent / name) for name in alike)}?)" if alike else ""
