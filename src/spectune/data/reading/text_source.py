"""Documents of plain text."""

import logging
from collections.abc import Iterator
from pathlib import Path

from spectune.data.reading.data_sizes import LINE, ROW, mib
from spectune.data.reading.raw_records import Record
from spectune.data.reading.text_stream import lines

log = logging.getLogger("spectune")

#: stands in a line of its own between two documents
SEPARATOR = "<|endoftext|>"


def text_records(path: Path, encoding: str | None = None, *, longest: int = ROW) -> Iterator[Record]:
    """Documents separated by a line that holds only `<|endoftext|>`; without one, the whole file is one document. One
    of more than `longest` characters comes in parts, which end where a line does, and the log says so. Raises
    DataError: a line is longer."""
    start, document, size, told = 1, list[str](), 0, False
    for number, line in enumerate(lines(path, encoding, longest=longest), start=1):
        if line.strip() == SEPARATOR:
            yield from _document(path, start, document)
            start, document, size = number + 1, [], 0
            continue
        if (size := size + len(line) + LINE) > longest and document:
            if not told:
                told = True
                log.warning(
                    "%s:%d: a document of more than %s is read in parts of that size; a line that holds %s alone "
                    "separates documents", path, start, mib(longest), SEPARATOR,
                )  # fmt: skip
            yield from _document(path, start, document)
            start, document, size = number, [], len(line) + LINE
        document.append(line.rstrip("\r"))  # a carriage return at a line's end belongs to the end
    yield from _document(path, start, document)


def _document(path: Path, start: int, document: list[str]) -> Iterator[Record]:
    text = "\n".join(document)
    if text.strip():
        yield f"{path}:{start}", {"text": text.strip("\n")}
