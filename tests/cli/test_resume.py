"""`--resume` on the command line: it goes on with what the folder has, and refuses what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.other_process import other_process_in

from spectune.training import loop as loop_module

Spectune = Callable[..., Any]
QUICK = ("--set", "max_steps=2", "--device", "cpu")


def test_train_goes_on_with_base_data_method_and_settings_of_the_folder(
    spectune: Spectune, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = loop_module.Loop.begin

    def stopping(self: Any, window: Any) -> None:
        if self.run.progress.step == 3:
            raise KeyboardInterrupt
        begin(self, window)

    command = ("train", "--model", base, "--data", rows, "--method", "bitfit", "--seed", "3", "--output-dir", "out")
    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Loop, "begin", stopping)
        assert spectune(*command, "--set", "max_steps=4", "--set", "save_steps=1").exit_code == 130
    before = Path("out/config.yaml").read_text()
    refused = spectune("train", "--resume", "--output-dir", "out", "--model", "spectune-tiny")
    assert refused.exit_code == 2
    assert "base: " in refused.stderr
    assert Path("out/config.yaml").read_text() == before
    result = spectune("train", "--resume", "--output-dir", "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert "going on from" in result.stderr
    answer = json.loads(result.stdout)
    assert (answer["method"], answer["seed"], answer["steps"]) == ("bitfit", 3, 4)
    assert Path("out/config.yaml").read_text() == before
    config = yaml.safe_load(before)
    assert (config["model"], config["data"], config["row_shape"]) == (str(base), str(rows), "prompt")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--method", "bitfit"), "method: 'lora' in the finished run, 'bitfit' now"),
        (("--set", "r=4"), "method.r: 2 in the finished run, 4 now"),
        (("--set", "max_steps=9"), "max_steps: 2 in the finished run, 9 now"),
    ],
)
def test_a_finished_run_with_other_flags_is_exit_2(
    spectune: Spectune, base: Path, rows: Path, more: tuple[str, ...], expected: str
) -> None:
    first = spectune("train", "--model", base, "--data", rows, "--set", "r=2", *QUICK, "--output-dir", "out")
    assert first.exit_code == 0, first.stderr
    assert spectune("train", "--resume", "--output-dir", "out").exit_code == 0
    result = spectune("train", "--resume", "--output-dir", "out", *more)
    assert result.exit_code == 2
    assert expected in result.stderr


def test_compare_goes_on_with_what_the_folder_has(spectune: Spectune, base: Path, rows: Path) -> None:
    command = ("compare", "--model", base, "--data", rows, "--methods", "lora", "--set", "lora.r=2", *QUICK)
    assert spectune(*command, "--quick", "--seeds", "1", "--output-dir", "out").exit_code == 0
    before = {path: path.read_text() for path in Path("out").rglob("config.yaml")}
    assert len(before) > 1  # the comparison's and the run's
    first = json.loads(Path("out/comparison.json").read_text())
    again = spectune("compare", "--resume", "--output-dir", "out", "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["runs"] == first["runs"]
    with other_process_in(Path("out"), "spectune compare") as other:
        for second in (("compare", "--resume", "--output-dir", "out"), (*command, "--output-dir", "out"), ("report",)):
            busy = spectune(*second, *(["out"] if second == ("report",) else []))
            assert busy.exit_code == 2
            assert f"spectune compare has it, process {other} on " in busy.stderr
    refused = spectune("compare", "--resume", "--output-dir", "out", "--set", "max_steps=9")
    assert refused.exit_code == 2
    assert "max_steps: 2 in the comparison, 9 now" in refused.stderr
    assert {path: path.read_text() for path in Path("out").rglob("config.yaml")} == before
    assert json.loads(Path("out/comparison.json").read_text()) == first


def test_a_dry_run_of_compare_reads_the_retained_text(spectune: Spectune, base: Path, rows: Path) -> None:
    command = ("compare", "--model", base, "--data", rows, "--methods", "bitfit", "--dry-run", "--device", "cpu")
    result = spectune(*command, "--retain", "nosuch.txt")
    assert result.exit_code == 3
    assert "nosuch.txt" in result.stderr
    Path("own.txt").write_text("some text")
    assert spectune(*command, "--retain", "own.txt").exit_code == 0


def test_runs_that_diverge_are_told_of_once_and_in_strict_json(
    spectune: Spectune, base: Path, rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ("compare", "--model", base, "--data", rows, "--methods", "lora,bitfit", "--set", "learning_rate=1e30")
    result = spectune(*command, "--set", "max_steps=1", "--device", "cpu", "--output-dir", "out", "--json")
    assert result.exit_code == 1
    assert {run["method"] for run in json.loads(result.stdout)["failed"]} == {"lora", "bitfit"}
    assert {"comparison.csv", "comparison.md"} <= {path.name for path in Path("out").iterdir()}
    assert not caplog.records
    assert result.stderr.count("lora, seed 0, failed:") == 1
