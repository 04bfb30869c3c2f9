"""Records of Parquet and Arrow files and of pyarrow's objects, batch by batch."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spectune.data.reading.raw_records import Record, as_record
from spectune.errors import DataError, first_line, some

#: so many rows are Python objects at once
_BATCH_ROWS = 1000
_ARROW_FILE = b"ARROW1"


def parquet_records(path: Path) -> Iterator[Record]:
    """The rows of a Parquet file. Raises DataError: it is damaged, or two columns have one name."""
    from pyarrow import parquet

    def batches() -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            check_names(file.schema_arrow.names, str(path))
            yield from file.iter_batches(batch_size=_BATCH_ROWS)

    yield from _file_records(path, batches(), "a readable Parquet file")


def arrow_records(path: Path) -> Iterator[Record]:
    """The rows of an Arrow file, in the file's or in the stream's format. Raises DataError as `parquet_records`."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with path.open("rb") as file:
            whole = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        with pyarrow.memory_map(str(path)) as mapped:
            if whole:
                file = pyarrow.ipc.open_file(mapped)
                check_names(file.schema.names, str(path))
                yield from (file.get_batch(number) for number in range(file.num_record_batches))
            else:
                stream = pyarrow.ipc.open_stream(mapped)
                check_names(stream.schema.names, str(path))
                yield from stream

    yield from _file_records(path, batches(), "a readable Arrow file")


def batch_records(batches: Iterable[Any]) -> Iterator[Any]:
    """The rows of record batches as Python objects; a batch may be as long as the whole table."""
    for batch in batches:
        # pyarrow gives a map's pairs unless it is asked for an object
        maps = {"maps_as_pydicts": "strict"} if "map<" in str(batch.schema) else {}
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield from batch.slice(start, _BATCH_ROWS).to_pylist(**maps)


def check_names(names: Iterable[Any], where: str) -> None:
    """Raises DataError: two columns have one name, of which a row could hold but one."""
    names = [str(name) for name in names]
    if doubled := sorted({repr(name) for name in names if names.count(name) > 1}):
        raise DataError(f"{where}: the column {some(doubled)} is there more than once; expected each name once")


def _file_records(path: Path, batches: Iterator[Any], kind: str) -> Iterator[Record]:
    rows = batch_records(batches)
    number = 0
    while True:
        try:
            row = next(rows, None)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{path}: not {kind} (row {number + 1}): {first_line(error)}") from error
        if row is None:
            return
        number += 1
        yield f"{path}:row {number}", as_record(row)
