"""Records out of whatever holds rows, each with the place it came from, and what cannot be read, with its place."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from spectune.data.reading.file_source import file_records, kind_of, near
from spectune.data.reading.folder_source import folder_records
from spectune.data.reading.hub_source import hub_records
from spectune.data.reading.object_source import object_records
from spectune.data.reading.raw_records import Bad, Record
from spectune.data.reading.text_source import SEPARATOR
from spectune.errors import DataError

__all__ = ["SEPARATOR", "Bad", "Record", "missing", "records"]


def records(
    source: Any, *, delimiter: str | None = None, encoding: str | None = None, known: Collection[str] = ()
) -> Iterator[Record]:
    """`(origin, record)` for each record of a file, a folder, a hub data set's name, a list or an iterator of dicts, a
    dict of columns, a `datasets` object, a DataFrame or a pyarrow table, one after the other in bounded memory (a .json
    file is read whole).

    Args:
        delimiter: of a CSV; None: found from its header.
        encoding: of a text file; None: UTF-8, or what its byte order mark says.
        known: further names of columns that mean something (`columns` renames them); as a mapping, it says which of a
            row's own names each stands for, and so which cells of a CSV are JSON.

    Raises:
        DataError: the source as a whole cannot be read.
    """
    if not isinstance(source, str | os.PathLike):
        yield from object_records(source, known)
        return
    path = Path(source)
    if os.path.isdir(path):  # never an error, whatever the text is; unlike the path's own
        yield from folder_records(path, delimiter=delimiter, encoding=encoding, known=known)
    elif os.path.lexists(path):
        yield from file_records(path, delimiter=delimiter, encoding=encoding, known=known)
    elif (problem := missing(source)) is not None:
        raise DataError(problem)
    else:
        yield from hub_records(str(source))


def missing(source: str | os.PathLike[str]) -> str | None:
    """What to say of a file that is not there; None where it is, or where the name may be that of a hub's data set."""
    if os.path.lexists(source) or (kind_of(Path(source)) is None and isinstance(source, str)):
        return None
    return f"{source}: no such file{near(Path(source))}"
