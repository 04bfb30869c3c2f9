"""Documents of the corpus: shards compressed with zstd, documents parted by a line `<|endoftext|>`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

END = "<|endoftext|>"


def read_text(path: Path) -> str:
    """The text of a `.txt` or `.txt.zst` file."""
    if path.suffix != ".zst":
        return path.read_text(encoding="utf-8")
    import pyarrow

    with pyarrow.OSFile(str(path)) as file, pyarrow.CompressedInputStream(file, "zstd") as stream:
        return stream.read().decode("utf-8")


def documents(path: Path) -> Iterator[str]:
    """Whole documents, without the separator."""
    for document in read_text(path).split(f"\n{END}\n"):
        text = document.strip("\n").removesuffix(END).strip("\n")
        if text:
            yield text
