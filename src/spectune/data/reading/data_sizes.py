"""How large things in data files may be: far beyond what anybody trains on, and small enough for any machine."""

import os
import stat
from pathlib import Path

from spectune.errors import DataError

#: of a line, a CSV's row or a table's row, in characters or bytes. A tokenizer takes 150 bytes for each character of a
#: text, and 8 MiB are more than any model reads at once
ROW = 8 << 20
#: of a .json that is one object
DOCUMENT = 256 << 20
#: columns of a table, keys of a row
COLUMNS = 10_000
#: commas and brackets in a JSON text that is read at once: each may become an object of 64 bytes
JSON_PARTS = 4_000_000
#: what is packed may become so much, or so many times its size if that is more
UNPACKED, RATIO = 256 << 20, 100
#: rows that a packed file or a table of any size may have; more need so many bytes each
ROWS, BYTES_A_ROW = 200_000, 8
#: what a line takes in memory beside its characters, and empty lines that may follow each other
LINE, EMPTY_LINES = 64, 1_000_000
#: files in a folder
FILES = 100_000
#: bad rows after which nothing more is read
BAD_ROWS = 100_000


def mib(size: int) -> str:
    return f"{size >> 20:,} MiB" if size >= 1 << 20 else f"{size:,} characters"


def row_too_long(where: str, most: int = ROW) -> DataError:
    return DataError(
        f"{where}: a row of more than {mib(most)}, which is the most that is read; split it, or take it out"
    )


def check_unpacked(path: Path, unpacked: int, packed: int, least: int = UNPACKED) -> None:
    """Raises DataError: a file becomes more than any data does."""
    if unpacked > max(least, RATIO * packed):
        raise DataError(
            f"{path}: {packed:,} bytes that become more than {mib(max(least, RATIO * packed))}, over {RATIO} times as "
            "much: that is no text, or the same again and again; unpack the file and look at it"
        )


def check_regular(path: Path) -> None:
    """Raises DataError: a pipe, a device, a socket, or a link that leads nowhere."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        if os.path.islink(path):
            raise DataError(f"{path}: a link to {os.readlink(path)}, which leads nowhere ({reason})") from None
        raise DataError(f"{path}: cannot be read: {reason}") from None
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    raise DataError(
        f"{path}: {kind}, expected a file: data is read again by --resume and eval, so write it to a file first"
    )
