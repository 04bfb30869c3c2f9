"""stdout and stderr while a command runs: plain text only, and nobody has to take it.

What is printed of the work does not stop the work: where the reader has left (`| head`) or the disk is full, `train`
goes on to its end. A command whose output is its result ends quietly where nobody reads it, and with an error where it
could not be written.
"""

from __future__ import annotations

import sys
from typing import Any, Self

from spectune.cli.console import complain, note
from spectune.errors import SpectuneError
from spectune.files.plain_streams import PlainStream, TolerantStream, open_standard_streams
from spectune.files.plain_text import message


class StandardStreams:
    """Inside the `with` `sys.stdout` and `sys.stderr` are plain streams; those that are so already stay."""

    def __init__(self) -> None:
        self._before: tuple[Any, Any] = (None, None)

    def __enter__(self) -> Self:
        self._before = sys.stdout, sys.stderr
        install()
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout, sys.stderr = self._before

    def exit_code(self, code: int, *, results: bool) -> int:
        """The command's exit code; another where it ended well and its result could not be written.

        Args:
            results: what goes to stdout is what the command was called for.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        below = getattr(sys.stdout, "rich_proxied_file", None)
        if below is None or below.failure is None or below.reader_left:
            return code
        why = f"standard output: {getattr(below.failure, 'strerror', None) or below.failure}"
        if results and code == 0:
            complain(f"{why}: not all of the answer was written there. Send it elsewhere, and run the command again")
            return SpectuneError.exit_code
        note(f"{why}: what was printed there is lost; nothing else is")
        return code


def install() -> None:
    """Put plain streams in the place of both, for as long as the process lives."""
    if not isinstance(sys.stdout, PlainStream):
        sys.stdout = PlainStream(TolerantStream(sys.stdout))
    if not isinstance(sys.stderr, PlainStream):
        sys.stderr = PlainStream(TolerantStream(sys.stderr), message)


def install_for_good() -> None:
    """For a process that does nothing else: tracebacks and warnings at its very end are plain, too."""
    open_standard_streams()
    install()
