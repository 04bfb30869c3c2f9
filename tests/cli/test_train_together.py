"""`spectune train --together`: several methods at once, each in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectune.results import RunResult

Spectune = Callable[..., Any]
QUICK = ("--set", "max_steps=2", "--device", "cpu")


def test_each_method_has_a_folder_and_resume_finds_them_finished(spectune: Spectune, base: Path, rows: Path) -> None:
    methods = "lora:r=2,bitfit,prompt:num_virtual_tokens=3"
    made = spectune("train", "--model", base, "--data", rows, "--method", methods, "--together", "--output-dir", "out",
                    "--json", *QUICK)  # fmt: skip
    assert made.exit_code == 0, made.stderr
    answer = json.loads(made.stdout)
    assert (answer["folder"], list(answer["runs"]), answer["failed"]) == ("out", ["lora", "bitfit", "prompt"], {})
    for name, run in answer["runs"].items():
        assert (Path("out") / name / "best").is_dir()
        assert RunResult.load(Path("out") / name / "result.json").model_dump(mode="json") == run
    assert answer["runs"]["lora"]["settings"]["r"] == 2
    recorded = yaml.safe_load(Path("out/config.yaml").read_text())
    assert (recorded["model"], recorded["together"], recorded["max_steps"]) == (str(base), "auto", 2)
    again = spectune("train", "--resume", "--output-dir", "out", "--json")
    assert again.exit_code == 0, again.stderr
    assert again.stderr.count("is finished already") == 3
    assert json.loads(again.stdout)["runs"] == answer["runs"]
    best = min(answer["runs"], key=lambda name: answer["runs"][name]["valid_loss"])
    written = spectune("generate", "number 1", "--run", "out", "--max-new-tokens", "2", "--json")
    assert written.exit_code == 0, written.stderr
    assert f"out/{best}" in written.stderr + written.stdout


def test_dry_run_says_how_many_share_a_pass_and_what_that_takes(spectune: Spectune, base: Path, rows: Path) -> None:
    command = ("train", "--model", base, "--data", rows, "--method", "lora,bitfit", "--together", "2", *QUICK)
    made = spectune(*command, "--dry-run", "--json")
    assert made.exit_code == 0, made.stderr
    found = json.loads(made.stdout)["together"]
    assert found["runs_in_a_pass"] == 2
    assert 0 < found["predicted_bytes"] < found["room_bytes"]
    assert "together: 2 of 2 runs share a pass; predicted" in made.stderr


def test_methods_that_come_twice_have_folders_of_their_own_and_resume_refuses_others(
    spectune: Spectune, base: Path, rows: Path
) -> None:
    same = ("--model", base, "--data", rows, "--together", "--output-dir", "out", *QUICK)
    failed = spectune("train", *same, "--method", "lora:r=2,dora:target_modules=nowhere")
    assert "nowhere" in failed.stderr
    assert not Path("out").exists()
    made = spectune("train", *same, "--method", "lora:r=2,lora:r=4")
    assert made.exit_code == 0, made.stderr
    ranks = [RunResult.load(Path("out") / name / "result.json").settings["r"] for name in ("lora", "lora-2")]
    assert ranks == [2, 4]
    other = spectune("train", *same, "--method", "lora:r=2,lora:r=8", "--resume")
    assert "method.r: 4 in the finished run, 8 now" in other.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--method", "lora,bitfit"), "train takes one method, given lora, bitfit; with --together it takes many"),
        (("--method", "lora,full", "--together"), "full trains the base itself"),
        (("--method", "lora,lora", "--together"), "--method: lora is named more than once"),
        (("--method", "lora", "--together", "0"), "together is '0'; expected auto, or how many runs share a pass"),
        (("--method", "lora,lora:task_type=SEQ_CLS", "--together=auto"), "set task_type for all"),
    ],
)
def test_what_is_refused(spectune: Spectune, base: Path, rows: Path, given: tuple[str, ...], expected: str) -> None:
    made = spectune("train", "--model", base, "--data", rows, *given, *QUICK)
    assert made.exit_code == 2
    assert expected in made.stderr
    assert not list(Path().glob("runs/*"))
