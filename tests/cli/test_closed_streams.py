"""Where nobody takes what is printed: the work goes on, and an answer that is lost is an error."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

from spectune.cli.app import build_app

Trained = Callable[[str], Path]
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")


@contextlib.contextmanager
def nobody(how: str) -> Iterator[TextIO | None]:
    """A stream whose reader has left, one on a full disk, one that was closed, or none at all."""
    if how == "none":
        yield None
        return
    number = os.open("/dev/full", os.O_WRONLY) if how == "full" else None
    if number is None:
        read, number = os.pipe()
        os.close(read)
    stream = open(number, "w", encoding="utf-8")  # noqa: SIM115 - closing it fails
    if how == "closed":
        stream.close()
    yield stream
    with contextlib.suppress(OSError):
        stream.close()


Called = Callable[..., tuple[int, str]]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Called:
    """`called("left", "train", ...)`: the command with such a stdout: its exit code, and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(how: str, *arguments: str | Path) -> tuple[int, str]:
        with nobody(how) as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            with pytest.raises(SystemExit) as end:
                build_app()([str(argument) for argument in arguments])
        return int(str(end.value.code)), capsys.readouterr().err

    return call


@pytest.mark.parametrize("how", ["left", pytest.param("full", marks=FULL), "closed", "none"])
def test_training_goes_on_to_its_end(called: Called, base: Path, rows: Path, how: str) -> None:
    common = ("--model", base, "--data", rows, "--device", "cpu", "--set", "memory_check=off")
    code, said = called(how, "train", *common, "--set", "max_steps=2", "--set", "logging_steps=1")
    assert code == 0, said
    [folder] = Path("runs").iterdir()
    assert json.loads((folder / "result.json").read_text())["steps"] == 2
    assert ("what was printed there is lost; nothing else is" in said) == (how in ("full", "closed"))


@pytest.mark.parametrize("how", ["left", pytest.param("full", marks=FULL), "none"])
def test_an_answer_that_cannot_be_written_is_an_error_and_one_that_nobody_reads_is_none(
    called: Called, trained_once: Trained, how: str
) -> None:
    for more in ((), ("--json",)):
        code, said = called(
            how, "generate", "a", "--run", trained_once("bitfit"), "--device", "cpu", "--max-new-tokens", "2", *more
        )
        lost = "error: standard output: No space left on device: not all of the answer was written there"
        assert (code, lost in said) == ((1, True) if how == "full" else (0, False))
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ("--version | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("--version >&-", 0, ""),
        pytest.param("--version > /dev/full", 1, "error: standard output: No space left on device", marks=FULL),
        ("train $'--\\e]0;x\\a\\u00e9' < /dev/null >&2", 2, r"has no flag --\x1b]0;x\x07\xe9"),
    ],
)
def test_a_process_ends_without_a_word_of_pythons_own(given: str, code: int, said: str) -> None:
    """By a shell: with its buffers, which Python writes at its very end, and a terminal that has ASCII alone."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"}
    command = ["bash", "-c", f'"{sys.executable}" -m spectune {given}']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code
    assert done.stderr.startswith(said) if code < 2 else said in done.stderr
    assert len(done.stderr.splitlines()) == (1 if said else 0)
