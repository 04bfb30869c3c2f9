"""Records out of files, each with the place it came from (`file:line`), and what cannot be read, with its place."""

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spectune.errors import DataError, first_line

SEPARATOR = "<|endoftext|>"
#: what is a list in a row, and so has to be written as JSON in a CSV's cell
_LISTS = ("references", "choices", "messages", "conversations")
_SHAPES = ("prompt", "completion", "instruction", "output", "text", "messages", "conversations")


class Bad(str):
    """What is wrong with a record that could not be read at all."""

    __slots__ = ()


Record = tuple[str, Mapping[str, Any] | Bad]


def records(source: Any) -> Iterator[Record]:
    """`(origin, record)` for each record of a path, a list of dicts, a `datasets.Dataset` or a hub data set's name.
    Raises DataError: the source as a whole cannot be read."""
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            raise DataError(f"{path} is a folder; expected a file (.jsonl, .json, .csv, .parquet, .txt)")
        if path.is_file():
            if (reader := _READERS.get(path.suffix.lower())) is None:
                known = ", ".join(sorted(_READERS))
                raise DataError(f"{path}: unknown kind of file {path.suffix!r}; expected one of {known}")
            yield from reader(path)
        elif path.suffix in _READERS or isinstance(source, Path):
            raise DataError(f"{path}: no such file{_near(path)}")
        else:
            yield from _hub(str(source))
    elif isinstance(source, Mapping) and not hasattr(source, "column_names"):
        raise DataError(f"expected rows (a path, a list of dicts, a datasets.Dataset), got one {type(source).__name__}")
    else:
        for number, record in enumerate(source, start=1):
            yield f"row {number}", _as_object(record)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _jsonl(path: Path) -> Iterator[Record]:
    # split at "\n" alone: str.splitlines would also split at separators that may stand inside JSON strings
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = _as_object(json.loads(line))
        except json.JSONDecodeError as error:
            found = Bad(f"malformed JSON at column {error.colno}: {error.msg}; expected one JSON object")
        except (ValueError, RecursionError) as error:  # numbers too long, nesting too deep
            found = Bad(f"JSON that cannot be read: {error}; expected one JSON object")
        yield f"{path}:{number}", found


def _json(path: Path) -> Iterator[Record]:
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: malformed JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # numbers too long, nesting too deep
        raise DataError(f"{path}: JSON that cannot be read: {error}; expected a list of objects") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of objects, got {type(content).__name__}")
    for number, record in enumerate(content, start=1):
        yield f"{path}:row {number}", _as_object(record)


def _csv(path: Path) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    header: list[str] | None = None
    while True:
        origin = f"{path}:{reader.line_num + 1}"  # of the row's first line: a quoted cell may hold line ends
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield origin, Bad(f"malformed CSV: {error}")
            continue
        if cells is None:
            return
        if not cells:
            continue  # a blank line
        if header is None:
            header = cells
        elif len(cells) != len(header):
            expected = f"{len(header)} columns as in the header, but {len(cells)}; expected {', '.join(header)}"
            yield origin, Bad(f"not {expected}")
        else:
            yield origin, _from_cells(dict(zip(header, cells, strict=True)))


def _from_cells(cells: dict[str, str]) -> Mapping[str, Any] | Bad:
    """A CSV row as a record: an empty cell is an absent key, and a list is written as JSON."""
    record: dict[str, Any] = {name: cell for name, cell in cells.items() if cell != ""}
    # but where its partner stands there, the cell is meant to be empty: a prompt may be, a completion must not
    for pair in (("prompt", "completion"), ("instruction", "output")):
        if any(name in record for name in pair):
            record.update({name: "" for name in pair if name in cells and name not in record})
    if not any(name in record for name in _SHAPES):
        record.update({name: "" for name in _SHAPES if name in cells})
    for name in _LISTS:
        if not record.get(name):
            record.pop(name, None)
            continue
        try:
            record[name] = json.loads(record[name])
        except (ValueError, RecursionError):
            return Bad(f'{name} is {record[name][:40]!r}; expected a list as JSON, such as ["one", "two"]')
    return record


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    for number, record in enumerate(table.to_pylist(), start=1):
        yield f"{path}:row {number}", {name: value for name, value in record.items() if value is not None}


def _plain(path: Path) -> Iterator[Record]:
    """Documents separated by a line that holds only `<|endoftext|>`; without one, the whole file is one document."""
    start, document = 1, []
    for number, line in enumerate([*_text(path).split("\n"), SEPARATOR], start=1):
        if line.strip() != SEPARATOR:
            document.append(line)
            continue
        if "".join(document).strip():
            yield f"{path}:{start}", {"text": "\n".join(document).strip("\n")}
        start, document = number + 1, []


_READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _plain}


def _hub(name: str) -> Iterator[Record]:
    import datasets

    path, _, split = name.removeprefix("hub:").partition(":")
    try:
        found = datasets.load_dataset(path, split=split or "train")
    except Exception as error:
        raise DataError(
            f"{name!r} is no file here{_near(Path(name))}, and as a data set of the hub it cannot be had "
            f"({first_line(error)}). Give a file (.jsonl, .json, .csv, .parquet, .txt), or a hub name that can be "
            "reached (`name:split`)."
        ) from error
    for number, record in enumerate(found, start=1):
        yield f"{name}:row {number}", {key: value for key, value in record.items() if value is not None}


def _as_object(record: Any) -> Mapping[str, Any] | Bad:
    return record if isinstance(record, Mapping) else Bad(f"a {type(record).__name__}, expected an object with keys")


def _near(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in _READERS and entry.is_file()]
    except OSError:
        return f" (there is no folder {path.parent} either)"
    near: Sequence[str] = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f" (did you mean {', '.join(str(path.parent / name) for name in near)}?)" if near else ""
