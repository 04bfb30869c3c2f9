"""Records of JSON lines, and of one JSON text."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from spectune.data.reading.raw_records import Bad, Record, as_record, json_object
from spectune.data.reading.single_object import rows_of_object
from spectune.data.reading.text_stream import lines, texts
from spectune.errors import DataError


def json_lines_records(path: Path, encoding: str | None = None) -> Iterator[Record]:
    """One object a line. Raises DataError: the file is JSON, but not in lines."""
    first = True
    for number, line in enumerate(lines(path, encoding), start=1):
        if not (bare := line.strip()):
            continue
        try:
            value = json.loads(line.rstrip("\r"), object_pairs_hook=json_object)
            found = Bad(_LIST) if isinstance(value, list) else as_record(value)
        except json.JSONDecodeError as error:
            if first and (bare == "{" or (bare[0] == "[" and bare[1:].lstrip()[:1] in ("", "{"))):
                raise DataError(f"{path}:{number}: {_NOT_IN_LINES[bare[0]]}") from None
            found = Bad(f"malformed JSON at column {error.colno}: {error.msg}; expected one JSON object")
        except (ValueError, RecursionError) as error:  # numbers too long, nesting too deep
            found = Bad(f"JSON that cannot be read: {error}; expected one JSON object")
        yield f"{path}:{number}", found
        first = False


_LIST = "a list, expected an object with keys (a file that is one list of objects is named .json)"
_NOT_IN_LINES = {
    "{": "an object over several lines; expected one whole object in each line (or a list of them, in a .json file)",
    "[": "a list over several lines; expected one object in each line, or the list in a file that is named .json",
}


def json_records(path: Path, encoding: str | None = None, known: Collection[str] = ()) -> Iterator[Record]:
    """A list of objects, or one object that can be read in one way only. Raises DataError."""
    content = _content(path, "".join(texts(path, encoding)))
    if isinstance(content, dict):
        content = rows_of_object(content, str(path), known)
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of objects, got {type(content).__name__}")
    for number, record in enumerate(content, start=1):
        yield f"{path}:row {number}", as_record(record)


def _content(path: Path, text: str) -> Any:
    if not text.strip():
        raise DataError(f"{path}: the file is empty; expected a list of objects")
    try:
        return json.loads(text, object_pairs_hook=json_object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[: error.pos].strip().startswith("{") and text[error.pos] == "{":
            raise DataError(
                f"{path}:{error.lineno}: a second object; expected one list of objects. If the file has one object in "
                "each line, name it .jsonl"
            ) from None
        raise DataError(f"{path}:{error.lineno}: malformed JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # numbers too long, nesting too deep
        raise DataError(f"{path}: JSON that cannot be read: {error}; expected a list of objects") from None
