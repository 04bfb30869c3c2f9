"""Documents of plain text."""

from collections.abc import Iterator
from pathlib import Path

from spectune.data.reading.limits import DOCUMENT, mib
from spectune.data.reading.raw_records import Record
from spectune.data.reading.text_stream import lines
from spectune.errors import DataError

#: stands in a line of its own between two documents
SEPARATOR = "<|endoftext|>"
#: what a line takes beside its characters
_LINE = 10


def text_records(path: Path, encoding: str | None = None, *, longest: int = DOCUMENT) -> Iterator[Record]:
    """Documents separated by a line that holds only `<|endoftext|>`; without one, the whole file is one document.
    Raises DataError: a document has more than `longest` characters."""
    start, document, size = 1, list[str](), 0
    for number, line in enumerate(lines(path, encoding, longest=longest), start=1):
        if line.strip() != SEPARATOR:
            if (size := size + len(line) + _LINE) > longest:
                raise DataError(
                    f"{path}:{start}: a document of more than {mib(longest)}, which is the most that is read; split "
                    f"it: a line that holds {SEPARATOR} alone separates documents"
                )
            document.append(line.rstrip("\r"))  # a carriage return at a line's end belongs to the end
            continue
        yield from _document(path, start, document)
        start, document, size = number + 1, [], 0
    yield from _document(path, start, document)


def _document(path: Path, start: int, document: list[str]) -> Iterator[Record]:
    text = "\n".join(document)
    if text.strip():
        yield f"{path}:{start}", {"text": text.strip("\n")}
