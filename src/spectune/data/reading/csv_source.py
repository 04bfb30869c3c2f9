"""Records of a CSV: the delimiter told or found, the header checked, lists and objects as JSON in their cells."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from spectune.data.reading.csv_cells import CsvRows, RowTooLongError, UnclosedQuoteError
from spectune.data.reading.limits import COLUMNS, ROW, mib
from spectune.data.reading.raw_records import AS_JSON, NAMES, SHAPES, Bad, Record, as_record, json_object
from spectune.data.reading.text_stream import lines
from spectune.errors import DataError, did_you_mean, some

#: delimiters that are looked for, and how each is called
DELIMITERS = {",": "','", ";": "';'", "\t": "a tab", "|": "'|'"}
#: a line before the header in which Excel is told the delimiter
_SAID = re.compile(r"sep=(.)\r?")


def csv_records(
    path: Path, encoding: str | None = None, *, delimiter: str | None = None, known: Collection[str] = (),
    longest: int = ROW,
) -> Iterator[Record]:  # fmt: skip
    """The rows below the header.

    Args:
        delimiter: the one to use; None: the one that makes known names out of the header.
        known: further names that count as known; a mapping says which of a row's names each stands for.

    Raises:
        DataError: the header does not say what is in the rows, a quote is never closed, or a row has more than
            `longest` characters.
    """
    given = lines(path, encoding, longest=longest)
    head = _header_lines(path, given, longest)
    if head and (said := _SAID.fullmatch(head[-1])):
        delimiter = delimiter or said[1]
        below = _header_lines(path, given, longest)
        head = [*[""] * len(head), *below] if below else []
    if not head:
        return
    meanings = {**{name: name for name in NAMES}, **_meanings(known)}
    default = "\t" if ".tsv" in path.suffixes[-2:] else ","
    try:
        told = _told(path, delimiter) or _found(path, head, default, meanings)
        rows = iter(CsvRows(chain(head, given), told, longest=longest))
        line, header = next(rows)
        where = f"{path}:{line}"
        if isinstance(header, Bad):
            raise DataError(f"{where}: the header is {header}")
        _check_header(where, head, header, meanings)
        columns = _Columns(header, meanings)
        for line, cells in rows:
            yield f"{path}:{line}", cells if isinstance(cells, Bad) else columns.record(cells)
    except RowTooLongError as error:
        more = f"{mib(longest)} in a row" if error.quoted else f"{COLUMNS:,} columns"
        quote = ": a quote opens there, and is not closed for as long" if error.quoted else ""
        raise DataError(f"{path}:{error.line}: more than {more}{quote}; expected less") from None
    except UnclosedQuoteError as error:
        raise DataError(
            f"{path}:{error.line}: a quote opens a cell and is never closed, so that the rest of the file would be in "
            'it; close it, or write a quote inside a cell twice ("")'
        ) from None


def _meanings(known: Collection[str]) -> Mapping[str, str]:
    return known if isinstance(known, Mapping) else {name: name for name in known}


def _header_lines(path: Path, given: Iterator[str], longest: int) -> list[str]:
    """The lines up to the header's end, which a quote may put off; empty where there is no header. Raises DataError: it
    is longer than a row may be."""
    head: list[str] = []
    quotes = size = 0
    for line in given:
        head.append(line)
        if (size := size + len(line) + 1) > longest:
            raise DataError(f"{path}:1: no header in the first {mib(longest)}; expected one, and its quotes closed")
        quotes += line.count('"')
        if line.strip("\r") and quotes % 2 == 0:
            return head
    return head if quotes else []


def _told(path: Path, delimiter: str | None) -> str | None:
    if delimiter == "\\t":  # as it is written in a shell
        return "\t"
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise DataError(f"{path}: delimiter is {delimiter!r}; expected one character, such as ',', ';' or a tab")
    return delimiter


def _header(head: list[str], delimiter: str) -> list[str]:
    """The header's names with this delimiter; none where it cannot be."""
    try:
        _, names = next(iter(CsvRows(iter(head), delimiter)))
    except (UnclosedQuoteError, StopIteration):
        return []
    return [] if isinstance(names, Bad) else names


def _found(path: Path, head: list[str], default: str, meanings: Mapping[str, str]) -> str:
    """The delimiter that makes the most known names out of the header."""
    headers = {delimiter: _header(head, delimiter) for delimiter in DELIMITERS}
    counts = {delimiter: sum(name in meanings for name in names) for delimiter, names in headers.items()}
    most = max(counts.values())
    best = [delimiter for delimiter in DELIMITERS if counts[delimiter] == most]
    if most == 0 or (default in best and all(headers[delimiter] == headers[default] for delimiter in best)):
        return default
    if len(best) > 1:
        named = " or ".join(DELIMITERS[delimiter] for delimiter in best)
        raise DataError(f"{path}:{len(head)}: the header {_shown(head)} may be delimited by {named}; give `delimiter`")
    return best[0]


def _shown(head: list[str]) -> str:
    header = head[-1].removesuffix("\r")
    return f"`{header[:80]}{'...' if len(header) > 80 else ''}`"


def _check_header(where: str, head: list[str], header: list[str], meanings: Mapping[str, str]) -> None:
    """Raises DataError: names that are doubled or empty, or none that makes a row."""
    if any("\r" in name for name in header):
        raise DataError(f"{where}: the rows end in a lone carriage return; save the file with line feeds")
    if len(header) > COLUMNS:
        raise DataError(f"{where}: {len(header):,} columns; expected at most {COLUMNS:,}")
    if doubled := sorted(repr(name) for name, count in Counter(header).items() if name and count > 1):
        raise DataError(f"{where}: the header has {some(doubled)} more than once; expected each name once")
    shapes = [name for name in header if name in meanings and (meanings[name] in SHAPES or meanings[name] not in NAMES)]
    if not shapes:
        other = [
            called
            for delimiter, called in DELIMITERS.items()
            if any(meanings.get(name) in SHAPES for name in _header(head, delimiter)) and len(header) == 1
        ]
        near = next((hint for name in header if (hint := did_you_mean(name, SHAPES, 0.7))), "")
        hint = f"is the delimiter {' or '.join(other)}?" if other else "name the `delimiter`, or rename the columns"
        columns = f"no column that makes a row{'' if other else near}; expected {', '.join(SHAPES)}"
        raise DataError(f"{where}: the header {_shown(head)} has {columns}; {hint}")
    if empty := [str(number) for number, name in enumerate(header, start=1) if not name.strip()]:
        raise DataError(
            f"{where}: the header has no name for column {some(empty)}; expected a name for each (pandas leaves out "
            "its index with to_csv(index=False))"
        )


class _Columns:
    """The header, and what it says of each row."""

    def __init__(self, header: list[str], meanings: Mapping[str, str]) -> None:
        self.header = header
        meant = {meanings[name]: name for name in header if name in meanings}
        self._shapes = [meant[key] for key in SHAPES if key in meant]
        pairs = (("prompt", "completion"), ("instruction", "output"))
        self._pairs = [[meant[key] for key in pair] for pair in pairs if all(key in meant for key in pair)]
        self._json = {meant[key]: key for key in AS_JSON if key in meant}

    def record(self, cells: list[str]) -> Mapping[str, Any] | Bad:
        """A row as a record: an empty cell is an absent key, and lists and objects are written as JSON."""
        header = self.header
        if len(cells) != len(header):
            columns = f"{len(header)} columns as in the header, but {len(cells)}"
            return Bad(f"not {columns}; expected {some(header)}")
        if cells == header and len(header) > 1:
            return Bad("the header a second time; expected a row")
        record: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell != ""}
        # but where its partner stands there, the cell is meant to be empty: a prompt may be, a completion must not
        for first, second in self._pairs:
            if first in record or second in record:
                record.setdefault(first, "")
                record.setdefault(second, "")
        if not any(name in record for name in self._shapes):
            record.update(dict.fromkeys(self._shapes, ""))
        for name, key in self._json.items():
            if (wrong := _parse(record, name, key)) is not None:
                return wrong
        return as_record(record) if self._json else record


def _parse(record: dict[str, Any], name: str, key: str) -> Bad | None:
    """The cell's JSON in its place; what is wrong with it."""
    if not (cell := record.pop(name, None)):
        return None
    try:
        found = json.loads(cell, object_pairs_hook=json_object)
    except (ValueError, RecursionError):
        example = '{"enable_thinking": false}' if key == "chat_template_kwargs" else '["one", "two"]'
        expected = "an object" if key == "chat_template_kwargs" else "a list"
        return Bad(f"{name} is {cell[:40]!r}; expected {expected} as JSON, such as {example}")
    if found is not None:
        record[name] = found
    return None
