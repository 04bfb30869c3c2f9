"""Streams that take plain text, and that nobody has to take."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Any

import pytest
from rich.progress import Progress

from spectune.files.plain_console import PlainConsole, above_bar, print_line
from spectune.files.plain_streams import PlainStream, TolerantStream

HOSTILE = "\x1b]8;;http://evil\x1b\\[link=http://evil]x[/link][/nope]\x1b]52;c;eA==\x07\u202e"
SHOWN = "\\x1b]8;;http://evil\\x1b\\[link=http://evil]x[/link][/nope]\\x1b]52;c;eA==\\x07\\u202e"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on(inner: Any) -> PlainStream:
    return PlainStream(TolerantStream(inner))


def test_what_is_printed_logged_and_raised_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    below = io.StringIO()
    monkeypatch.setattr(sys, "stderr", on(below))
    print(HOSTILE, file=sys.stderr)
    logging.lastResort.emit(logging.makeLogRecord({"msg": HOSTILE, "levelno": logging.ERROR}))  # type: ignore[union-attr]
    sys.excepthook(ValueError, ValueError(HOSTILE), None)
    assert below.getvalue().count(SHOWN) == 3
    assert "\x1b" not in below.getvalue()
    assert not hasattr(sys.stderr, "buffer")


def test_colours_of_ours_are_there_and_those_of_the_text_are_not() -> None:
    below = Terminal()
    console = PlainConsole(file=on(below), force_terminal=True, color_system="standard", width=200)
    console.print(HOSTILE, style="bold")
    print_line(console, HOSTILE)
    assert below.getvalue() == f"\x1b[1m{SHOWN}\x1b[0m\n{SHOWN}\n"


def test_above_a_bar_text_is_plain_too(monkeypatch: pytest.MonkeyPatch) -> None:
    below = Terminal()
    monkeypatch.setattr(sys, "stderr", on(below))
    console = PlainConsole(file=sys.stderr, force_terminal=True, color_system="standard", width=200)
    with Progress(console=console, redirect_stdout=False, redirect_stderr=False) as bar, above_bar(console):
        bar.add_task("x", total=1)
        print(HOSTILE, file=sys.stderr)
    assert SHOWN in below.getvalue()
    assert "\x1b]" not in below.getvalue()


@pytest.mark.parametrize("error", [BrokenPipeError(32, "gone"), OSError(28, "full"), ValueError("closed")])
def test_a_stream_that_nobody_takes_stops_nothing(error: Exception) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    stream = TolerantStream(Broken())
    console = PlainConsole(file=PlainStream(stream))
    for _ in range(2):
        console.print("x")
        stream.write("x")
        stream.flush()
    assert stream.failure is error
    assert stream.reader_left == isinstance(error, BrokenPipeError)


def test_the_console_of_the_library_goes_on_when_the_reader_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich itself would end the program."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        print_line(PlainConsole(), "x")
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            gone.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)


def test_a_terminal_of_ascii_and_one_that_is_not_there() -> None:
    raw = io.BytesIO()
    stream = on(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    stream.write("é\x1b\udc80")
    assert raw.getvalue() == b"\\xe9\\x1b\\udc80"
    nobody = on(None)
    nobody.write("x")
    nobody.flush()
    assert not nobody.isatty()
