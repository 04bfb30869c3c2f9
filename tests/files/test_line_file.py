"""A file of lines: whole ones, one writer, and nothing of anybody else's is touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spectune.errors import BusyFolderError, ConfigError, WriteError
from spectune.files.line_file import line_file
from tests.files.children import Child, files_of_at_most

BEGINS = b'{"line": '


def write(path: Path, *lines: str, resume: bool = False) -> list[bytes]:
    """Returns what was there before."""
    with line_file(path, resume=resume, begins=BEGINS) as file:
        before = list(file.lines())
        for line in lines:
            file.write(line)
    return before


def test_lines_are_added_and_part_of_one_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    assert write(path, '{"line": 1}', '{"line": 2, "text": "ä"}') == []
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"line": 3, "te')
    assert write(path, '{"line": 3}', resume=True) == whole.splitlines()
    assert path.read_bytes() == whole + b'{"line": 3}\n'


@pytest.mark.parametrize("content", [b"notes of mine", b'{"line": 1}\n', b"\0" * 10])
def test_without_resume_what_is_there_stays_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is there already: go on in it with --resume"):
        write(path, "x")
    assert path.read_bytes() == content


def test_what_another_program_wrote_is_not_gone_on_in(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"one\ntwo")
    with pytest.raises(ConfigError, match="was not written by this command"):
        write(path, "x", resume=True)
    assert path.read_bytes() == b"one\ntwo"


def test_folders_and_devices_are_refused_and_an_empty_file_is_taken(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(ConfigError, match="is no plain file"):
            write(path, "x")
    (tmp_path / "empty").touch()
    assert write(tmp_path / "empty", '{"line": 1}') == []
    with pytest.raises(ConfigError, match="is in a file"):
        write(tmp_path / "empty" / "x", "x")


def test_a_second_writer_is_refused_while_the_first_one_lives(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"

    def work(child: Child) -> None:
        with line_file(path, resume=False, begins=BEGINS) as file:
            file.write('{"line": 1}')
            child.ready()
            child.wait()

    child = Child(work).wait_until_ready()
    with pytest.raises(BusyFolderError, match="another process writes it"):
        write(path, resume=True)
    child.kill()
    assert write(path, '{"line": 2}', resume=True) == [b'{"line": 1}']


def test_a_line_that_does_not_fit_is_not_there_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"

    def work(_: Child) -> None:
        with files_of_at_most(30), line_file(path, resume=False, begins=BEGINS) as file:
            file.write('{"line": 1}')
            try:
                file.write('{"line": 2, "text": "' + "x" * 100)
            except WriteError as error:
                os._exit(7 if "--resume" in str(error) else 1)

    assert Child(work).join() == 7
    assert path.read_bytes() == b'{"line": 1}\n'


def test_one_in_which_nothing_was_written_is_taken_away_again(tmp_path: Path) -> None:
    assert write(tmp_path / "out.jsonl") == []
    assert list(tmp_path.iterdir()) == []
