"""Records of JSON lines, and of one JSON text."""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from spectune.data.reading.data_sizes import DOCUMENT, JSON_PARTS, ROW, mib, row_too_long
from spectune.data.reading.raw_records import Bad, Record, as_record, json_object
from spectune.data.reading.single_object import rows_of_object
from spectune.data.reading.text_stream import lines, texts
from spectune.errors import DataError

_NO_SPACE = re.compile(r"[^ \t\n\r]")


def json_lines_records(path: Path, encoding: str | None = None, *, longest: int = ROW) -> Iterator[Record]:
    """One object a line. Raises DataError: the file is JSON, but not in lines, or a line has more than `longest`
    characters."""
    first = True
    for number, line in enumerate(lines(path, encoding, longest=longest), start=1):
        if not (bare := line.strip()):
            continue
        try:
            if len(line) > JSON_PARTS:
                check_parts(line)
            value = json.loads(line.rstrip("\r"), object_pairs_hook=json_object)
            found = Bad(_LIST) if isinstance(value, list) else as_record(value)
        except json.JSONDecodeError as error:
            if first and (bare == "{" or (bare[0] == "[" and bare[1:].lstrip()[:1] in ("", "{"))):
                raise DataError(f"{path}:{number}: {_NOT_IN_LINES[bare[0]]}") from None
            found = Bad(f"malformed JSON at column {error.colno}: {error.msg}; expected one JSON object")
        except (ValueError, RecursionError) as error:  # numbers too long, nesting too deep, too many parts
            found = Bad(f"JSON that cannot be read: {error}; expected one JSON object")
        yield f"{path}:{number}", found
        first = False


_LIST = "a list, expected an object with keys (a file that is one list of objects is named .json)"
_NOT_IN_LINES = {
    "{": "an object over several lines; expected one whole object in each line (or a list of them, in a .json file)",
    "[": "a list over several lines; expected one object in each line, or the list in a file that is named .json",
}


def check_parts(text: str, most: int = JSON_PARTS) -> None:
    """Raises ValueError: a JSON text of more lists, objects and values than a row has."""
    if len(text) > most and sum(map(text.count, ",[{")) > most:
        raise ValueError(f"more than {most:,} values in it")


def json_records(
    path: Path, encoding: str | None = None, known: Collection[str] = (), *, longest: int = ROW, most: int = DOCUMENT
) -> Iterator[Record]:
    """A list of objects, item by item, or one object that can be read in one way only. Raises DataError: it is neither;
    an item has more than `longest` characters, or an object in all more than `most`."""
    text = _Text(path, texts(path, encoding), longest)
    if text.next() == "[":
        yield from _items(path, text)
        return
    whole = text.rest(most)
    content = _content(path, whole)
    if isinstance(content, dict):
        content = rows_of_object(content, str(path), known)
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of objects, got {type(content).__name__}")
    for number, record in enumerate(content, start=1):
        yield f"{path}:row {number}", as_record(record)


class _Text:
    """A JSON text, as much of it as is looked at."""

    def __init__(self, path: Path, pieces: Iterator[str], longest: int) -> None:
        self.path, self._pieces, self._longest = path, pieces, longest
        self.buffer, self.at, self.ended = "", 0, False
        #: lines that are over, and characters of the line that the buffer begins in
        self._lines, self._before = 0, 0

    def more(self) -> bool:
        """Read on: as much again as is there. False at the end. Raises DataError: an item is too long."""
        if self.at:
            over = self.buffer[: self.at]
            self._lines += over.count("\n")
            self._before = len(over) - over.rfind("\n") - 1 if "\n" in over else self._before + len(over)
            self.buffer, self.at = self.buffer[self.at :], 0
        if len(self.buffer) > self._longest:
            raise row_too_long(f"{self.path}:{self._lines + 1}", self._longest)
        pieces, length = [self.buffer], 0
        while length <= len(self.buffer) and not self.ended:
            piece = next(self._pieces, None)
            if piece is None:
                self.ended = True
                break
            pieces.append(piece)
            length += len(piece)
        self.buffer = "".join(pieces)
        return length > 0

    def next(self) -> str:
        """The next character that is no white space, where the text then is; empty at the end."""
        while True:
            if found := _NO_SPACE.search(self.buffer, self.at):
                self.at = found.start()
                return found[0]
            self.at = len(self.buffer)
            if not self.more():
                return ""

    def rest(self, most: int) -> str:
        """All of the text. Raises DataError: it is longer."""
        pieces, length = [self.buffer], len(self.buffer)
        for piece in self._pieces:
            pieces.append(piece)
            if (length := length + len(piece)) > most:
                raise DataError(
                    f"{self.path}: one JSON object of more than {mib(most)}, which is the most that is read at once; "
                    "write its rows as JSON lines (.jsonl), or as one list"
                )
        return "\n" * self._lines + " " * self._before + "".join(pieces)

    def where(self, at: int) -> tuple[int, int]:
        """Line and column of a place in the buffer, both from 1 on."""
        over = self.buffer[:at]
        if "\n" in over:
            return self._lines + over.count("\n") + 1, len(over) - over.rfind("\n")
        return self._lines + 1, self._before + at + 1

    def wrong(self, at: int, message: str) -> DataError:
        line, column = self.where(at)
        return DataError(f"{self.path}:{line}: malformed JSON at column {column}: {message}")


def _items(path: Path, text: _Text) -> Iterator[Record]:
    """The items of a list, of which the text is at the opening bracket."""
    decode = json.JSONDecoder(object_pairs_hook=json_object).raw_decode
    text.at += 1
    number = 0
    end = text.next()
    while end != "]" or number:
        while True:
            try:
                found, stop = decode(text.buffer, text.at)
                if stop < len(text.buffer) or text.ended:  # else it may be the beginning of a longer number
                    break
            except json.JSONDecodeError as error:
                if text.ended:
                    raise text.wrong(error.pos, error.msg) from None
            except (ValueError, RecursionError) as error:  # numbers too long, nesting too deep, too many parts
                raise DataError(f"{path}: JSON that cannot be read: {error}; expected a list of objects") from None
            text.more()
        text.at = stop
        number += 1
        yield f"{path}:row {number}", as_record(found)
        end = text.next()
        if end == "]":
            break
        if end != ",":
            raise text.wrong(text.at, "Expecting ',' delimiter")
        comma, text.at = text.at, text.at + 1
        if text.next() == "]":
            raise text.wrong(max(text.at - 1, 0) if comma >= len(text.buffer) else comma, _TRAILING)
    text.at += 1
    if text.next():
        raise text.wrong(text.at, "Extra data")


_TRAILING = "Illegal trailing comma before end of array"


def _content(path: Path, text: str) -> Any:
    if not text.strip():
        raise DataError(f"{path}: the file is empty; expected a list of objects")
    try:
        check_parts(text, 10 * JSON_PARTS)
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
