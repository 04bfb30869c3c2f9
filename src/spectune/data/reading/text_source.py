"""Documents of plain text."""

from collections.abc import Iterator
from pathlib import Path

from spectune.data.reading.raw_records import Record
from spectune.data.reading.text_stream import lines

#: stands in a line of its own between two documents
SEPARATOR = "<|endoftext|>"


def text_records(path: Path, encoding: str | None = None) -> Iterator[Record]:
    """Documents separated by a line that holds only `<|endoftext|>`; without one, the whole file is one document."""
    start, document = 1, list[str]()
    for number, line in enumerate(lines(path, encoding), start=1):
        if line.strip() != SEPARATOR:
            document.append(line.rstrip("\r"))  # a carriage return at a line's end belongs to the end
            continue
        yield from _document(path, start, document)
        start, document = number + 1, []
    yield from _document(path, start, document)


def _document(path: Path, start: int, document: list[str]) -> Iterator[Record]:
    text = "\n".join(document)
    if text.strip():
        yield f"{path}:{start}", {"text": text.strip("\n")}
