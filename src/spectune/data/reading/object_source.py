"""Records of Python objects: lists, iterators, columns, `datasets` objects, DataFrames, pyarrow's tables."""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from spectune.data.reading.raw_records import SHAPES, Record, as_record
from spectune.data.reading.single_object import refuse_splits, rows_of_columns
from spectune.data.reading.table_source import batch_records, check_names
from spectune.errors import DataError, some

_EXPECTED = (
    "expected rows: a path, a list (or an iterator) of dicts, a dict of columns, a datasets.Dataset, a DataFrame or a "
    "pyarrow.Table"
)


def object_records(source: Any, known: Collection[str] = ()) -> Iterator[Record]:
    """`(row N, record)` for each row of an object in memory. Raises DataError: it holds no rows, or several splits."""
    if _is_of("datasets", source, "Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict"):
        return dataset_records(source, "the data")
    return _numbered(_rows(source, known), "")


def dataset_records(found: Any, name: str) -> Iterator[Record]:
    """The rows of a `datasets` object, of a dictionary its `train` or only one. Raises DataError: no split is clear."""
    if isinstance(found, Mapping):
        if not found:
            raise DataError(f"{name}: a {type(found).__name__} without any split")
        if "train" not in found and len(found) > 1:
            raise DataError(f"{name}: none of the splits {some(list(found))} is train; give the one that is meant")
        found = found["train"] if "train" in found else next(iter(found.values()))
    # rows in the format of some library become Python's own; a function that makes them is the user's, and stays
    if (getattr(found, "format", None) or {}).get("type") != "custom":
        found = found.with_format(None)
    return _numbered(found, "" if name == "the data" else f"{name}:")


def _numbered(rows: Iterable[Any], prefix: str) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield f"{prefix}row {number}", as_record(row)


def _rows(source: Any, known: Collection[str]) -> Iterable[Any]:
    if isinstance(source, Mapping):
        return _columns(source, known)
    if _is_of("pandas", source, "DataFrame"):
        return _frame_rows(source)
    if _is_of("pyarrow", source, "Table", "RecordBatchReader", "RecordBatch"):
        check_names(source.schema.names, type(source).__name__)
        single = _is_of("pyarrow", source, "RecordBatch")
        return batch_records([source] if single else source.to_batches() if hasattr(source, "to_batches") else source)
    if hasattr(source, "iter_rows") and hasattr(source, "to_dicts"):  # polars
        rows: Iterable[Any] = source.iter_rows(named=True)
        return rows
    if hasattr(source, "collect_schema") and hasattr(source, "collect"):  # a lazy one of polars
        raise DataError(f"{_EXPECTED}; got a {_name(source)}: give what its collect() returns")
    if isinstance(source, bytes | bytearray) or hasattr(source, "readline") or not _is_iterable(source):
        hint = "; give its path" if hasattr(source, "readline") else ""
        raise DataError(f"{_EXPECTED}; got {'None' if source is None else f'a {_name(source)}'}{hint}")
    if hasattr(source, "dtype"):  # a Series, an array, a tensor
        raise DataError(f"{_EXPECTED}; got a {_name(source)}, which has no named columns")
    iterable: Iterable[Any] = source
    return iterable


def _columns(source: Mapping[Any, Any], known: Collection[str]) -> list[Mapping[str, Any]]:
    """The rows of a dict of columns. Raises DataError: it is something else."""
    refuse_splits(source, "the data")
    content = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in source.items()}
    content = {key: list(value) if isinstance(value, tuple) else value for key, value in content.items()}
    columns = [key for key, value in content.items() if isinstance(value, list)]
    chats = [
        key for key in ("messages", "conversations") if any(isinstance(m, Mapping) for m in content.get(key) or ())
    ]
    if columns and not chats and (len(columns) == len(content) or any(key in {*SHAPES, *known} for key in columns)):
        return rows_of_columns(content, "the data")
    if any(key in {*SHAPES, *known} for key in content):
        raise DataError(f"{_EXPECTED}; got one dict, which is one row: give it in a list, [row]")
    raise DataError(f"{_EXPECTED}; got one dict with {some([str(key) for key in content]) or 'no keys'}")


def _frame_rows(frame: Any) -> Iterator[dict[str, Any]]:
    """The rows of a pandas.DataFrame; what pandas takes for missing is absent."""
    names = [str(name) for name in frame.columns]
    check_names(names, "DataFrame")
    for values in zip(*(frame.iloc[:, number] for number in range(len(names))), strict=True):
        yield {name: None if _is_nan(value) else value for name, value in zip(names, values, strict=True)}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def _is_of(library: str, source: Any, *names: str) -> bool:
    """Whether it is of these classes of a library, which nobody needs to import to know: else there was no object."""
    module = sys.modules.get(library)
    return module is not None and any(isinstance(source, getattr(module, name, ())) for name in names)


def _is_iterable(source: Any) -> bool:
    try:
        iter(source)
    except TypeError:
        return False
    return True


def _name(source: Any) -> str:
    return f"{type(source).__module__}.{type(source).__qualname__}".removeprefix("builtins.")
