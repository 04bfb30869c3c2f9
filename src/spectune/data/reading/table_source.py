"""Records of Parquet and Arrow files and of pyarrow's objects, batch by batch."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spectune.data.reading.limits import COLUMNS, JSON_PARTS, ROW, check_unpacked, row_too_long
from spectune.data.reading.raw_records import Record, as_record
from spectune.errors import DataError, first_line, some

#: so many rows are Python objects at once
_BATCH_ROWS = 1000
#: bytes of a batch, by what the file says of itself
_BATCH_BYTES = 64 << 20
#: address space that reading a batch may take
_ROOM = 5 << 28
_ARROW_FILE = b"ARROW1"


def parquet_records(path: Path, *, longest: int = ROW, room: int = _ROOM) -> Iterator[Record]:
    """The rows of a Parquet file. Raises DataError: it is damaged, two columns have one name, a row is longer, or
    decoding takes more than `room`."""
    from pyarrow import parquet

    def batches() -> Iterator[Any]:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            check_names(file.schema_arrow.names, str(path))
            yield from file.iter_batches(batch_size=_batch_rows(file.metadata), use_threads=False)

    yield from _file_records(path, batches(), "a readable Parquet file", longest, room)


def _batch_rows(metadata: Any) -> int:
    """So many rows at once that a batch is not too large, by what a row has on average."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    heaviest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
    return int(min(max(_BATCH_BYTES / max(heaviest, 1), 1), _BATCH_ROWS))


def arrow_records(path: Path, *, longest: int = ROW, room: int = _ROOM) -> Iterator[Record]:
    """The rows of an Arrow file, in the file's or in the stream's format. Raises DataError as `parquet_records`."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with path.open("rb") as file:
            whole = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        with pyarrow.memory_map(str(path)) as mapped:
            if whole:
                file = pyarrow.ipc.open_file(mapped)
                check_names(file.schema.names, str(path))
                found = (file.get_batch(number) for number in range(file.num_record_batches))
            else:
                found = pyarrow.ipc.open_stream(mapped)
                check_names(found.schema.names, str(path))
            for batch in found:
                batch.validate(full=True)  # reading one whose offsets lead elsewhere would end the process
                yield batch

    yield from _file_records(path, batches(), "a readable Arrow file", longest, room)


def batch_records(batches: Iterable[Any]) -> Iterator[Any]:
    """The rows of record batches as Python objects; a batch may be as long as the whole table."""
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield from _as_rows(batch.slice(start, _BATCH_ROWS))


def _as_rows(batch: Any) -> list[Any]:
    # pyarrow gives a map's pairs unless it is asked for an object
    found: list[Any] = batch.to_pylist(**({"maps_as_pydicts": "strict"} if "map<" in str(batch.schema) else {}))
    return found


def check_names(names: Iterable[Any], where: str) -> None:
    """Raises DataError: two columns have one name, of which a row could hold but one; or there are too many."""
    counts = Counter(str(name) for name in names)
    if doubled := sorted(repr(name) for name, count in counts.items() if count > 1):
        raise DataError(f"{where}: the column {some(doubled)} is there more than once; expected each name once")
    if len(counts) > COLUMNS:
        raise DataError(f"{where}: {len(counts):,} columns; expected at most {COLUMNS:,}")


def _file_records(path: Path, batches: Iterator[Any], kind: str, longest: int, room: int) -> Iterator[Record]:
    number = decoded = 0
    size = os.stat(path).st_size
    while True:
        try:
            with _memory(room):
                batch = next(batches, None)
            if batch is None:
                return
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                for part in _parts(batch.slice(start, _BATCH_ROWS), f"{path}:row", number, longest):
                    decoded += part.nbytes
                    check_unpacked(path, decoded, size)
                    for row in _as_rows(part):
                        number += 1
                        yield f"{path}:row {number}", as_record(row)
        except DataError:
            raise
        except MemoryError as error:
            raise DataError(
                f"{path}: decoding what follows row {number} takes more than {room >> 20:,} MiB at once; no row may "
                f"have more than {longest >> 20} MiB"
            ) from error
        except Exception as error:
            raise DataError(f"{path}: not {kind} (row {number + 1}): {first_line(error)}") from error


def _parts(batch: Any, where: str, before: int, longest: int) -> Iterator[Any]:
    """A batch in parts that are small as Python objects. Raises DataError: one row alone is not."""
    size, values = _size(batch), sum(_values(column) for column in batch.columns)
    if size <= max(longest, 1) and values <= JSON_PARTS:
        yield batch
    elif batch.num_rows == 1:
        raise row_too_long(f"{where} {before + 1}", longest)
    else:
        half = batch.num_rows // 2
        yield from _parts(batch.slice(0, half), where, before, longest)
        yield from _parts(batch.slice(half), where, before + half, longest)


def _size(batch: Any) -> int:
    """Bytes of a batch, those of a text that several rows share counted for each."""
    return int(batch.nbytes) + sum(_shared(column) for column in batch.columns)


def _shared(array: Any) -> int:
    """Bytes of texts that stand in an array once for several values."""
    import pyarrow
    from pyarrow import compute, types

    kind = array.type
    if types.is_dictionary(kind):
        values = array.dictionary
        if str(kind.value_type) in ("string", "binary", "large_string", "large_binary"):
            return int(compute.sum(compute.take(compute.binary_length(values), array.indices)).as_py() or 0)
        return int(values.nbytes) * len(array)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        long = pyarrow.large_binary() if types.is_binary_view(kind) else pyarrow.large_string()
        one = (array.slice(place, 1).cast(long) for place in range(len(array)))
        return sum(int(compute.sum(compute.binary_length(text)).as_py() or 0) for text in one)
    return sum(_shared(child) for child in _children(array))


def _children(array: Any) -> list[Any]:
    """The arrays that a list's, an object's or a map's values stand in."""
    from pyarrow import types

    kind = array.type
    if types.is_struct(kind):
        return [array.field(number) for number in range(kind.num_fields)]
    if types.is_map(kind):
        start, stop = array.offsets[0].as_py(), array.offsets[len(array)].as_py()
        return [array.keys.slice(start, stop - start), array.items.slice(start, stop - start)]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [array.flatten()]
    return [array.storage] if hasattr(array, "storage") else []


def _values(array: Any) -> int:
    """How many Python objects an array becomes, lists counted with what is in them."""
    return len(array) + sum(_values(child) for child in _children(array))


@contextlib.contextmanager
def _memory(room: int) -> Iterator[None]:
    """What is done within takes at most so much more memory: an allocation beyond it fails, and says so. A file's own
    words on its size may be lies. Where there is no such limit, nothing is limited."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY and soft <= now + room:
            raise OSError("there is a tighter one")
        resource.setrlimit(resource.RLIMIT_AS, (now + room, hard))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
