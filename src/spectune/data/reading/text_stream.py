"""Text out of files, piece by piece: gzip and zstd unpacked, the encoding told or found, a wrong byte named by line."""

import codecs
import gzip
import itertools
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from spectune.data.reading.limits import ROW, check_unpacked, row_too_long
from spectune.errors import DataError

#: packed text formats have one of these behind their own suffix
PACKED = (".gz", ".zst", ".zstd")
_CHUNK = 1 << 16
#: a packed chunk of zstd may grow thirty-thousandfold
_PACKED_CHUNK = 1 << 11
#: memory that a zstd file may ask for to be unpacked; `zstd` itself gives no more unless it is told
_WINDOW = 1 << 27
#: as many bytes of a file's beginning say how it is encoded
_BEGINNING = 1024
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
#: files that were given a text file's name
_NO_TEXT = {
    b"\x1f\x8b": "packed by gzip: name it so (.gz)",
    b"\x28\xb5\x2f\xfd": "packed by zstd: name it so (.zst)",
    b"PAR1": "a Parquet file: name it so (.parquet)",
    b"ARROW1": "an Arrow file: name it so (.arrow)",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as CSV",
}


def lines(path: Path, encoding: str | None = None, *, longest: int = ROW) -> Iterator[str]:
    """The lines without their "\\n", at which alone they are split: a lone "\\r" and Unicode's separators belong to
    the text. Raises DataError: the file cannot be read, is not in this encoding, or has a line of more than `longest`
    characters."""
    pieces: list[str] = []
    number, length = 1, 0
    for text in texts(path, encoding):
        first, *more = text.split("\n")
        pieces.append(first)
        length += len(first)
        if length > longest:
            raise row_too_long(f"{path}:{number}", longest)
        for line in more:
            yield "".join(pieces)
            pieces = [line]
        if more:
            number, length = number + len(more), len(more[-1])
    if last := "".join(pieces):
        yield last


def texts(path: Path, encoding: str | None = None) -> Iterator[str]:
    """The text of a file in pieces. Raises DataError as `lines` does."""
    stream = _chunks(path)
    beginning = next(stream, b"")
    while len(beginning) < _BEGINNING and (more := next(stream, b"")):
        beginning += more
    name = _told(path, encoding) if encoding else _found(path, beginning)
    decoder = codecs.getincrementaldecoder(name)()
    line, position, started = 1, 0, False
    for chunk in itertools.chain([beginning], stream, [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            whole = bytes(error.object)
            line += whole[: error.start].decode(name, "ignore").count("\n")
            at = position - (len(whole) - len(chunk)) + error.start
            raise DataError(_wrong_byte(path, line, at, beginning, encoding)) from None
        position += len(chunk)
        line += text.count("\n")
        if text:
            yield text if started else text.removeprefix("\ufeff")
            started = True


def _wrong_byte(path: Path, line: int, at: int, beginning: bytes, encoding: str | None) -> str:
    for mark, kind in _NO_TEXT.items():
        if beginning.startswith(mark):
            return f"{path}: no text; it is {kind}"
    if encoding:
        return f"{path}:{line}: byte {at} is not {encoding}; expected the `encoding` that the file was saved in"
    return (
        f"{path}:{line}: byte {at} is not UTF-8; save the file as UTF-8, or give the `encoding` that it was saved in "
        "(such as cp1252, latin-1, gb18030 or shift_jis)"
    )


def _told(path: Path, encoding: str) -> str:
    try:
        name = codecs.lookup(encoding).name
        "".encode(name)  # refuses codecs that are none of text, such as base64
        codecs.getincrementaldecoder(name)
    except (LookupError, ValueError):
        raise DataError(
            f"{path}: unknown encoding {encoding!r}; expected one of Python's names, such as utf-8, utf-16 or cp1252"
        ) from None
    return name


def _found(path: Path, beginning: bytes) -> str:
    for mark, name in _MARKS:
        if beginning.startswith(mark):
            return name
    # Latin letters in UTF-16 are half zeros, and so would be read as UTF-8 without any complaint
    zeros = [beginning[start::2].count(0) for start in (0, 1)]
    if len(beginning) >= 8 and max(zeros) > len(beginning) // 4 > 4 * min(zeros):
        name = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
        raise DataError(f"{path}:1: looks like UTF-16 without its mark; save it as UTF-8, or give encoding={name!r}")
    return "utf-8"


def _chunks(path: Path) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if suffix == ".gz":
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield from _bounded(path, file, iter(lambda: unpacked.read(_CHUNK), b""))
            elif suffix in PACKED:
                yield from _bounded(path, file, _zstd(path, file))
            else:
                yield from iter(lambda: file.read(_CHUNK), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged, or no gzip file: {error}; make it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file that has become a pipe since it was looked at without waiting for somebody to write into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _bounded(path: Path, file: IO[bytes], chunks: Iterator[bytes]) -> Iterator[bytes]:
    packed, unpacked = os.fstat(file.fileno()).st_size, 0
    for chunk in chunks:
        unpacked += len(chunk)
        check_unpacked(path, unpacked, packed)
        yield chunk


def _zstd(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame: the package's own reader takes a file that breaks off for one that ends."""
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    frame: Any = None
    try:
        while packed := file.read(_PACKED_CHUNK):
            while packed:
                frame = frame or unpacker.decompressobj()
                unpacked = frame.decompress(packed)
                yield from (unpacked[at : at + _CHUNK] for at in range(0, len(unpacked), _CHUNK))
                packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        if "too much memory" in str(error):
            raise DataError(
                f"{path}: packed by zstd with a window of more than {_WINDOW >> 20} MiB; pack it again without --long"
            ) from None
        raise DataError(f"{path}: damaged, or no zstd file: {error}; make it again") from None
    if frame is not None:
        raise DataError(f"{path}: damaged: the zstd stream breaks off; make it again")
