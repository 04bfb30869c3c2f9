"""One object that stands for many rows: columns, a list under some name, or a row itself; never a guess between two."""

from collections.abc import Collection, Mapping
from typing import Any

from spectune.data.reading.raw_records import AS_JSON, SHAPES, SPLITS, Doubled
from spectune.errors import DataError, some


def rows_of_object(content: Mapping[str, Any], where: str, known: Collection[str] = ()) -> list[Mapping[str, Any]]:
    """The rows that an object of a JSON file holds, or is.

    Raises:
        DataError: it can be read in no way, or in more than one.
    """
    if isinstance(content, Doubled):
        raise DataError(f"{where}: the key {content.key!r} stands twice; expected each key once")
    refuse_splits(content, where)
    shapes = [key for key in content if key in SHAPES or key in known]
    own = [key for key in shapes if isinstance(content[key], str) or _holds_messages(content[key])]
    columns = [key for key in shapes if isinstance(content[key], list | Mapping) and key not in own]
    lists = [key for key, value in content.items() if _holds_objects(value) and key not in own]
    of_rows = [key for key in lists if any(_is_row(item, known) for item in content[key])]
    columns = [key for key in columns if key not in of_rows]
    if own:
        of_rows = [key for key in of_rows if key not in AS_JSON]  # documents may have a text, and are the row's own
        if columns or of_rows:
            raise DataError(
                f"{where}: one object with {some([*own, *columns, *of_rows])}, which may be a row itself or hold rows; "
                "expected a list of objects"
            )
        return [content]
    if columns:
        if of_rows:
            raise DataError(
                f"{where}: columns ({some(columns)}) and rows ({some(of_rows)}) in one object; expected one"
            )
        return rows_of_columns(content, where)
    if len(lists) > 1:
        raise DataError(f"{where}: one object with several lists of objects ({some(lists)}); expected one, or the list")
    if lists:
        return list(content[lists[0]])
    return _unnamed(content, where)


def _unnamed(content: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    """The rows of an object without any known name and without a list of objects."""
    lists = [value for value in content.values() if isinstance(value, list)]
    if len(lists) == 1 and not lists[0]:
        return []
    if len(lists) == len(content) > 0 and len({len(value) for value in lists}) == 1:
        return rows_of_columns(content, where)
    keys = some([str(key) for key in content]) or "no keys"
    raise DataError(f"{where}: expected a list of objects, got one object with {keys}")


def rows_of_columns(content: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    """The rows of columns of the same length: lists, or objects whose keys are the rows' numbers, as pandas has them.
    Raises DataError: they are not of one kind and length."""
    first_name, first = next(iter(content.items()))
    for name, column in content.items():
        if not isinstance(column, Mapping if isinstance(first, Mapping) else list):
            kinds = f"{first_name} is {_kind(first)}, {name} is {_kind(column)}"
            raise DataError(f"{where}: one object of columns, but {kinds}; expected lists of the same length")
        if len(column) != len(first):
            lengths = f"{first_name} has {len(first)} values, {name} has {len(column)}"
            raise DataError(f"{where}: one object of columns, but {lengths}; expected lists of the same length")
        if isinstance(column, Mapping) and (
            list(column) != list(first) or not all(str(key).isdecimal() for key in first)
        ):
            keys = f"the keys of {first_name} ({some([*map(str, first)])}) and {name} ({some([*map(str, column)])})"
            raise DataError(f"{where}: one object of columns, but {keys} are not the same numbers of rows")
    columns = [column.values() if isinstance(column, Mapping) else column for column in content.values()]
    return [dict(zip(content, values, strict=True)) for values in zip(*columns, strict=True)]


def refuse_splits(content: Mapping[str, Any], where: str) -> None:
    """Raises DataError: an object of several parts of a data set."""
    splits = [key for key in content if str(key).lower() in SPLITS and not isinstance(content[key], str | int | None)]
    if len(splits) > 1:
        raise DataError(f"{where}: several splits in one ({some(splits)}); give the one that is meant, by itself")


def _kind(value: Any) -> str:
    if isinstance(value, Mapping | list):
        return "an object" if isinstance(value, Mapping) else "a list"
    return "null" if value is None else repr(value)[:40]


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)


def _holds_messages(value: Any) -> bool:
    """A list of messages: objects, none of which is a row itself."""
    return _holds_objects(value) and not any(_is_row(item, ()) for item in value)


def _is_row(item: Any, known: Collection[str]) -> bool:
    return isinstance(item, Mapping) and any(key in SHAPES or key in known for key in item)
