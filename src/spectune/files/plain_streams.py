"""Streams that a program writes to: what is written reaches a terminal as plain text, and what nobody takes stops
nothing.

`PlainStream` stands in the place of `sys.stdout` and `sys.stderr`, so that whatever is printed, logged or warned of
goes through it, by libraries too. A console that has made its text plain itself, and adds colours of its own, writes to
what lies below: `rich_proxied_file` is the name under which rich asks for that.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Callable
from typing import Any, TextIO

from spectune.files.plain_text import plain


class TolerantStream(io.TextIOBase):
    """A stream that goes on without a word where the other end is closed or full, and keeps the first error.

    Characters that its encoding lacks are written as Python's escapes.

    Attributes:
        failure: the first error; None where all was taken.
    """

    def __init__(self, inner: TextIO | None) -> None:
        self.inner = inner
        self.failure: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        self._try(self._written, text)
        return len(text)

    def flush(self) -> None:
        if self.inner is not None:
            self._try(self.inner.flush)

    def isatty(self) -> bool:
        try:
            return self.inner is not None and self.inner.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self.inner is None:
            raise io.UnsupportedOperation("this stream is closed")
        return self.inner.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.inner, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    @property
    def reader_left(self) -> bool:
        """Whether the stream ended because nobody reads it any more."""
        return isinstance(self.failure, BrokenPipeError)

    def _written(self, text: str) -> None:
        if self.inner is None:
            return
        try:
            self.inner.write(text)
        except UnicodeEncodeError:
            self.inner.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        if self.failure is not None:
            return
        try:
            action(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.failure = error
            self._discard()

    def _discard(self) -> None:
        """What is still in the buffers goes nowhere: else Python would try it again, and complain, when it ends."""
        with contextlib.suppress(OSError, ValueError):
            number = self.fileno()
            if number in (1, 2):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


class PlainStream(io.TextIOBase):
    """A stream on which only plain text is written. It has no `buffer`: bytes would go past it.

    Args:
        below: takes the text, and what a console of ours writes.
        shown: makes text plain.
    """

    def __init__(self, below: TolerantStream, shown: Callable[[str], str] = plain) -> None:
        self.rich_proxied_file = below
        self._shown = shown

    def write(self, text: str) -> int:
        # a lone carriage return is a library's bar of progress: one line after the other
        self.rich_proxied_file.write(self._shown(text.replace("\r\n", "\n").replace("\r", "\n")))
        return len(text)

    def flush(self) -> None:
        self.rich_proxied_file.flush()

    def isatty(self) -> bool:
        return self.rich_proxied_file.isatty()

    def fileno(self) -> int:
        return self.rich_proxied_file.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.rich_proxied_file.encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        return self.rich_proxied_file.errors

    def __getattr__(self, name: str) -> Any:
        if name in ("buffer", "raw"):
            raise AttributeError(name)
        return getattr(self.rich_proxied_file.inner, name)


def open_standard_streams() -> None:
    """Where a process was started with one of the descriptors 0 to 2 closed, open it on nothing: else the next file
    that is opened, a checkpoint say, would have that number, and get what libraries print."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
