"""A console of rich on which text is shown as plain text: its colours are ours, and nothing in the text is markup."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.file_proxy import FileProxy
from rich.segment import Segment
from rich.text import Text

from spectune.files.plain_streams import TolerantStream
from spectune.files.plain_text import plain


class PlainConsole(Console):
    """What any text that is printed may do is to be read. Nobody has to take it: a closed or full stream stops nothing.

    Args:
        options: those of `rich.console.Console`; text has no markup, emoji and highlights.
    """

    def __init__(self, **options: Any) -> None:
        self._tolerant: TolerantStream | None = None
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    @property
    def file(self) -> IO[str]:
        """Where to write."""
        below: Any = super().file
        while not isinstance(below, TolerantStream) and hasattr(below, "rich_proxied_file"):
            below = below.rich_proxied_file  # of what stands in a stream's place
        if isinstance(below, TolerantStream):
            return cast("IO[str]", below)
        if self._tolerant is None or self._tolerant.inner is not below:
            self._tolerant = TolerantStream(below)
        return cast("IO[str]", self._tolerant)

    @file.setter
    def file(self, new: IO[str]) -> None:
        self._file = new

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, before rich drops what it would not show."""
        return super().render_str(plain(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of a renderable, with plain text; what moves the cursor of a bar is no text."""
        for segment in super().render(renderable, options):
            if segment.control is None:
                text, style = plain(segment.text), segment.style
                if style is not None and style.link is not None:
                    style = style.update_link(None)
                yield segment if text == segment.text and style is segment.style else Segment(text, style)
            else:
                yield segment


def print_line(console: Console, line: str) -> None:
    """Print a line that holds a user's own words, never folded; the console may be the user's."""
    console.print(plain(line), soft_wrap=True, highlight=False, markup=False, emoji=False)


class _AboveBar(FileProxy):
    """What is printed while a bar is shown, above it."""

    def write(self, text: str) -> int:
        return super().write(plain(text))


@contextlib.contextmanager
def above_bar(console: Console) -> Iterator[None]:
    """Inside, what is written to stdout and stderr appears above the console's bar, where it has one on a terminal."""
    before = sys.stdout, sys.stderr
    if console.is_terminal:
        sys.stdout, sys.stderr = _AboveBar(console, before[0]), _AboveBar(console, before[1])
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _AboveBar):
                stream.flush()
        sys.stdout, sys.stderr = before
