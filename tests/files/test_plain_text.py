"""What is shown to a user may do nothing but be read."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectune.files.plain_text import clipped, command_line, json_text, markdown_code, message, one_line, plain

#: each would do something to a terminal, or make one name look like another
OBEYED = {
    "colour": "\x1b[31m", "screen": "\x1b[2J", "title": "\x1b]0;x\x07", "link": "\x1b]8;;http://x\x1b\\",
    "clipboard": "\x1b]52;c;eA==\x07", "C1": "\x9b31m", "next line": "\x85", "backspace": "\b", "delete": "\x7f",
    "carriage return": "a\rb", "override": "\u202e", "isolate": "\u2067", "line": "\u2028", "paragraph": "\u2029",
    "half": "\udc80", "joiner": "lo\u200dra", "space": "lo\u200bra", "mark": "\u200elora", "tag": "\U000e0041",
    "byte order": "\ufeff", "hyphen": "lo\xadra",
}  # fmt: skip


@pytest.mark.parametrize("text", OBEYED.values(), ids=OBEYED)
def test_what_a_terminal_would_obey_or_hide_is_shown_as_an_escape(text: str) -> None:
    shown = plain(text)
    assert shown.isascii()
    assert shown.isprintable()
    assert "\\" in shown
    assert plain(shown) == shown
    assert json.loads(json_text({text: text})) == {text: text}
    assert json_text(text).isascii()


@pytest.mark.parametrize("text", ["a\tb\nc", "naïve 漢字 🙂", "می\u200cخواهم", "👩\u200d⚕️", "שלום\u200f!", "क्\u200dष"])
def test_what_is_written_in_any_script_stays(text: str) -> None:
    assert plain(text) == text


@given(st.text())
def test_json_gives_back_every_character_in_any_encoding(text: str) -> None:
    for encoding in ("utf-8", "ascii", "latin-1"):
        shown = json_text([text], encoding)
        shown.encode(encoding)
        assert json.loads(shown) == [text]
        assert plain(shown) == shown


def test_lines_end_as_here() -> None:
    assert plain("a\r\nb") == "a\nb"
    assert one_line("a\r\n b\t c") == "a b c"


def test_what_is_long_is_cut_and_says_how_long_it_was() -> None:
    assert clipped("x" * 1_000_000, 10) == "xxxxxxxxxx… (1,000,000 characters in all)"
    assert len(said := message(f"{'x' * 1_000_000}: there is no such file")) < 1100
    assert said.endswith(": there is no such file")
    assert "1,000,023 characters in all" in said
    assert len(message("a\n" * 10_000).splitlines()) == 201


@pytest.mark.parametrize(
    "name", ["a b", "it's", "$(touch x)", "`x`;&", "a\nb", "\x1b[31m", "é\u202e", "-x", "*", "a\\nb'"]
)
def test_a_hint_is_one_line_that_a_shell_reads_as_the_name(name: str, tmp_path: Path) -> None:
    line = command_line("printf", "%s|", Path(name), "--flag")
    assert line == plain(line)
    assert "\n" not in line
    given = subprocess.run(["bash", "-c", line], capture_output=True, check=True, cwd=tmp_path).stdout.decode()
    assert given == f"{'./' if name.startswith('-') else ''}{name}|--flag|"
    assert list(tmp_path.iterdir()) == []


def test_a_path_stays_inside_its_code() -> None:
    assert markdown_code("runs/a`](x)|b") == "`runs/a'](x)/b`"
