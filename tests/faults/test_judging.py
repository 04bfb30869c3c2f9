"""The harness of damage itself: it sees what it is there to see, and makes the same case of the same seed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tests.faults import hostile_chats, hostile_rows, spoiling, spoiling_tensors
from tests.faults.child import Case, Forks, Outcome
from tests.faults.damage import Judgement, Trial, Truth, judged, leaves

ENDED = Outcome(rc=3, stdout="", stderr="error: its/config.json: no JSON object\n", seconds=0.1, memory=0)
TRIAL = Trial(Path(), ("eval",), "its/config.json", "cut", names=("config.json",))
TRUTH = Truth(0, "as ever\n", {".loss": 1.5}, {"best/x.safetensors": "0" * 64})
SAME = ({".loss": 1.5, ".more": 1}, {"best/x.safetensors": "0" * 64})


def misdeeds(elsewhere: str) -> None:
    """What no case may do, in a watched process."""
    Path("code.py").write_text("x = 1")
    exec(compile("x = 1", os.path.abspath("code.py"), "exec"))
    Path(elsewhere).write_text("x")
    Path("inside").write_text("x")
    for forbidden in (lambda: subprocess.run(["true"]), lambda: socket.create_connection(("localhost", 9))):
        with pytest.raises(ConnectionRefusedError):
            forbidden()


def test_code_programs_network_and_files_elsewhere_are_seen_and_stopped(forks: Forks, tmp_path: Path) -> None:
    folder, log = tmp_path / "case", tmp_path / "log"
    folder.mkdir()
    watch = ("tests.faults.watching:watch", {"root": str(folder), "log": str(log)})
    call, given = "tests.faults.test_judging:misdeeds", {"elsewhere": str(tmp_path / "elsewhere")}
    outcome = forks.run(Case(cwd=folder, call=call, given=given, faults=(watch,)))
    assert outcome.rc == 0, outcome
    seen = [line.strip("'\"") for line in log.read_text().splitlines()]
    assert {line.partition(":")[0] for line in seen} == {"code", "written", "program", "network"}
    assert not any("inside" in line for line in seen)


def faults(
    outcome: Outcome, trial: Trial = TRIAL, result: tuple[dict[str, object], dict[str, str]] = SAME
) -> Judgement:
    return judged(trial, TRUTH, outcome, [], result)


def test_a_refusal_names_what_it_is_about() -> None:
    assert (faults(ENDED).faults, faults(ENDED).heard) == ((), "refused")
    for stderr, fault in (
        ("error: something is wrong\n", "not named"), ("oh\n", "no message"),
        ("error: config.json" + "x" * 30_000, "long message"), ("error: config.json\nerror: again", "several messages"),
        ("error: config.json \x1b[2J", "control characters"),
        ("Traceback (most recent call last):\nValueError: config.json", "traceback"),
    ):  # fmt: skip
        assert faults(replace(ENDED, stderr=stderr)).faults == (fault,)
    assert faults(replace(ENDED, rc=77)).faults == ("exit code 77",)
    assert faults(replace(ENDED, rc=5)).faults == ("memory",)
    assert faults(replace(ENDED, rc=-9, hung=True)).faults == ("hang",)
    assert faults(replace(ENDED, rc=-11)).faults == ("killed by signal 11",)


def test_a_result_that_differs_has_to_be_said_by_the_file_s_name() -> None:
    ran = replace(ENDED, rc=0, stderr="as ever\n")
    other = ({".loss": 1.6}, SAME[1])
    assert (faults(ran).faults, faults(ran).heard) == ((), "same")
    assert (faults(ran, result=other).faults, faults(ran, result=other).heard) == (("silent change",), "silent")
    assert faults(ran, result=(SAME[0], {})).heard == "silent"
    assert faults(ran, replace(TRIAL, knowable=False), other).heard == "unknowable"
    assert faults(replace(ran, stderr="as ever\nwarning: config.json was changed\n"), result=other).heard == "warned"


def test_clocks_and_memory_are_no_result() -> None:
    content = {"loss": 1.0, "train_seconds": 2.0, "peak_memory_bytes": {"a": 1}, "rows": [{"x": None}]}
    assert leaves(content) == {".loss": 1.0, ".rows#": 1, ".rows.0.x": None}


@pytest.fixture
def places(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "a" / "same", tmp_path / "b" / "same"]
    for folder in found:
        folder.mkdir(parents=True)
    return found


def test_a_seed_gives_the_same_case(places: list[Path]) -> None:
    header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    for seed in range(10):
        said = []
        for folder in places:
            for path in folder.iterdir():
                path.unlink()
            (folder / "x.json").write_text(json.dumps({"a": [1, 2.5, {"b": "c"}], "d": None}))
            (folder / "x.safetensors").write_bytes(b"")
            spoiling_tensors.write_tensors(folder / "x.safetensors", header, {"x": bytes(8)})
            random = Random(seed)
            blows = [random.choice(spoiling.JSON)(random, folder / "x.json")]
            blows.append(random.choice(spoiling_tensors.TENSORS)(random, folder / "x.safetensors"))
            bytes_now = [path.read_bytes() for path in sorted(folder.iterdir())]
            said.append([*blows, bytes_now, hostile_rows.mixed(Random(seed)), hostile_chats.mutated(Random(seed))])
        assert repr(said[0]) == repr(said[1])
