"""Every command end to end on a tiny base: what it prints, writes, and exits with."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.quick import others_slow

from spectune.methods import METHODS

Spectune = Callable[..., Any]
QUICK = ("--set", "max_steps=2", "--device", "cpu")
UNPLANNED = ("--set", "memory_check=off")  # of each run; plans have tests of their own


@pytest.fixture
def run(spectune: Spectune, base: Path, rows: Path) -> Path:
    """A finished LoRA run of two steps under runs/."""
    result = spectune("train", "--model", base, "--data", rows, "--set", "separator=: ", "--set", "r=2", *QUICK)
    assert result.exit_code == 0, result.stderr
    [folder] = Path("runs").iterdir()
    return folder


def test_train_prints_counts_and_writes_a_run(spectune: Spectune, base: Path, rows: Path) -> None:
    result = spectune("train", "--model", base, "--data", rows, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "LoRA: " in result.stdout
    assert "trainable" in result.stdout
    assert "%" in result.stdout
    assert "drawn with seed 0, are held out" in result.stderr
    [folder] = Path("runs").iterdir()
    assert folder.name.endswith("-lora-1")
    found = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "environment.json", "data_report.json", "metrics.jsonl", "best", "result.json"} <= found
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["model"], config["data"], config["device"]) == (str(base), str(rows), "cpu")


@pytest.mark.parametrize(
    "method", others_slow(("full", "adapter", "prefix", "prompt", "lora", "bitfit"), ("full", "prompt", "lora"))
)
def test_every_method_trains_and_is_found_again(spectune: Spectune, base: Path, rows: Path, method: str) -> None:
    common = ("--model", base, "--data", rows, "--valid", rows, *QUICK)
    result = spectune("train", "--method", method, "--json", *common)
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["method"], answer["steps"]) == (method, 2)
    evaluated = spectune("eval", "--data", rows, "--generate-rows", "0", "--json", "--device", "cpu")
    assert evaluated.exit_code == 0, evaluated.stderr
    found = json.loads(evaluated.stdout)
    assert found["tuned"]["loss_nats_per_token"] == pytest.approx(answer["valid_loss"], abs=1e-5)
    assert found["base"]["loss_nats_per_token"] == pytest.approx(answer["base_valid_loss"], abs=1e-5)


def test_a_runs_config_is_the_same_run_again(spectune: Spectune, run: Path) -> None:
    result = spectune("train", "--config", run / "config.yaml", "--output-dir", "again", "--json")
    assert result.exit_code == 0, result.stderr
    first, second = json.loads((run / "result.json").read_text()), json.loads(result.stdout)
    for key in ("method", "settings", "learning_rate", "steps", "train_loss", "valid_loss"):
        assert first[key] == second[key]


def test_resume(spectune: Spectune, base: Path, rows: Path) -> None:
    command = ("train", "--model", base, "--data", rows, *QUICK, "--output-dir", "out")
    assert spectune(*command, "--resume").exit_code == 0  # nothing saved: starts
    again = spectune(*command, "--resume")
    assert again.exit_code == 0
    assert "finished already" in again.stdout
    refused = spectune(*command)
    assert refused.exit_code == 2
    assert "not empty" in refused.stderr
    nowhere = spectune("train", "--resume")
    assert nowhere.exit_code == 2
    assert "--output-dir" in nowhere.stderr


@pytest.mark.slow  # in a fork it is one of the kinds of faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(base: Path, rows: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A real process, a real signal: exit 130, a checkpoint, and the command that goes on."""
    command = [sys.executable, "-m", "spectune", "train", "--model", str(base), "--data", str(rows)]
    command += ["--output-dir", "out", "--set", "max_steps=100000", "--set", "eval_steps=50", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "out" / "best").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "--output-dir out --resume" in stderr
    assert "Traceback" not in stderr
    assert list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("command", ["train", "compare"])
def test_interrupt_outside_of_the_loop(
    spectune: Spectune, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    # by import_module: the attribute `comparing.compare` is the function
    room, step = {"train": ("training.prepare", "encode"), "compare": ("comparing.beginning", "retained_passages")}[
        command
    ]
    monkeypatch.setattr(importlib.import_module(f"spectune.{room}"), step, stop)
    result = spectune(command, "--model", base, "--data", rows, "--output-dir", "out")
    assert result.exit_code == 130
    assert "stopped: " in result.stderr
    assert "--output-dir out --resume" in result.stderr


@pytest.mark.parametrize("method", ["full", "lora"])
def test_dry_run_writes_nothing(spectune: Spectune, base: Path, rows: Path, method: str) -> None:
    result = spectune("train", "--model", base, "--data", rows, "--method", method, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    [found] = json.loads(result.stdout)["runs"]
    assert found["steps"] == 1
    assert "saved" not in result.stderr
    assert list(Path().iterdir()) == []


def test_generate(spectune: Spectune, run: Path, rows: Path) -> None:
    result = spectune("generate", "number 3", "number 4", "--max-new-tokens", "4", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert f"run: {run}" in result.stderr
    answer = json.loads(result.stdout)
    assert [output["prompt"] for output in answer["outputs"]] == ["number 3", "number 4"]
    table = spectune("generate", "--data", rows, "--rows", "2", "--max-new-tokens", "4", "--run", run)
    assert table.exit_code == 0
    assert "reference:  is even" in table.stdout


def test_eval_prints_tuned_and_base(spectune: Spectune, run: Path, rows: Path) -> None:
    of_texts = ("--metric", "exact_match,bleu", "--generate-rows", "2", "--max-new-tokens", "4")
    result = spectune("eval", "--data", rows, *of_texts)
    assert result.exit_code == 0, result.stderr
    for word in ("tuned", "bare base", "perplexity", "exact match", "bleu"):
        assert word in result.stdout


def test_eval_choices(spectune: Spectune, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    row = {"prompt": "number 3", "completion": " is odd", "choices": [" is odd", " is even"], "label": " is odd"}
    path.write_text(json.dumps(row) + "\n")
    result = spectune("eval", "--data", path, "--generate-rows", "0", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["tuned"]["choice_accuracy"] in (0.0, 1.0)


def test_no_run_says_what_makes_one(spectune: Spectune) -> None:
    for command in ("generate", "eval", "merge", "export"):
        result = spectune(command)
        assert result.exit_code == 2
        assert "`spectune train` or `spectune compare` makes one" in result.stderr


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["{}"], ":17: "),
        (['{"prompt": "a", "completion": "b"'], ":17: malformed JSON"),
        (['{"prompt": "a", "completion": ""}'], ":17: completion is empty"),
    ],
)
@pytest.mark.parametrize("command", ["validate", "train", "compare"])
def test_bad_rows_are_exit_3(
    spectune: Spectune, base: Path, tmp_path: Path, command: str, lines: list[str], expected: str
) -> None:
    path = tmp_path / "bad.jsonl"
    good = ['{"prompt": "a", "completion": "b"}'] * 16
    path.write_text("\n".join([*good, *lines]) + "\n")
    result = spectune(command, "--model", base, "--data", path)
    assert result.exit_code == 3
    assert f"{path}{expected}" in result.stderr
    assert result.stdout == ""


def test_skip_bad_rows_counts_them(spectune: Spectune, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    result = spectune("validate", "--model", base, "--data", path, "--skip-bad-rows", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["report"]["bad"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("train", "--no-such-flag"), 2, "spectune train has no flag --no-such-flag"),
        (("train", "--set", "learning_rat=1"), 2, "did you mean 'learning_rate'"),
        (("train", "--method", "lorra"), 2, "did you mean 'lora'"),
        (("train", "--method", "lora,bitfit"), 2, "train takes one method"),
        (("train", "--config", "none.yaml"), 2, "no such file"),
        (("train", "--data", "none.jsonl"), 3, "none.jsonl"),
        (("train", "--device", "tpu"), 2, "device 'tpu' is unknown"),
        (("train", "--dtype", "int8"), 2, "dtype 'int8' is unknown"),
        (("generate", "--run", "nowhere"), 3, "nowhere is not a folder"),
        (("trian",), 2, "Did you mean 'train'"),
    ],
)
def test_errors_have_their_own_exit_code(
    spectune: Spectune, base: Path, rows: Path, arguments: tuple[str, ...], code: int, expected: str
) -> None:
    more = ("--model", base) if arguments[0] == "train" else ()
    more += ("--data", rows) if arguments[0] == "train" and "--data" not in arguments else ()
    result = spectune(*arguments, *more)
    assert result.exit_code == code, result.stderr
    assert expected in result.stderr
    assert result.stdout == ""
    assert not Path("runs").exists()


def test_a_base_that_is_not_there(spectune: Spectune, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = spectune("train", "--model", "nobody/nothing", "--data", rows)
    assert result.exit_code == 3
    for word in ("nobody/nothing", "local folder", "HF_HOME", "HF_HUB_OFFLINE"):
        assert word in result.stderr


def test_a_loss_that_is_not_finite_is_exit_6(spectune: Spectune, base: Path, rows: Path) -> None:
    result = spectune(
        "train", "--model", base, "--data", rows, "--method", "full", "--set", "learning_rate=1e30",
        "--set", "max_steps=20", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 6, result.stderr


def test_compare(spectune: Spectune, base: Path, rows: Path) -> None:
    command = ("compare", "--model", base, "--data", rows, "--methods", "lora,bitfit", "--set", "lora.r=2", *QUICK)
    command = (
        *command,
        "--quick",
        "--seeds",
        "2",
        "--generate-rows",
        "1",
        "--fractions",
        "4,1",
        "--max-memory",
        "1GiB",
        *UNPLANNED,
    )
    result = spectune(*command, "--output-dir", "out", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    found = [(run["method"], run["seed"], run["steps"]) for run in answer["runs"]]
    assert found == [("lora", 0, 2), ("lora", 1, 2), ("bitfit", 0, 2), ("bitfit", 1, 2)]
    assert {(point["name"], point["rows"]) for point in answer["curves"]} == {
        (name, count) for name in ("lora", "bitfit") for count in (4, 11)
    }
    assert answer["recommendation"]["limits"]["max_memory_bytes"] == 2**30
    assert "budget: 2 methods" in result.stderr
    assert answer["runs"][0]["settings"]["r"] == 2
    assert answer["failed"] == []
    found = {path.name for path in Path("out").iterdir()}
    assert {"runs", "comparison.json", "comparison.csv", "comparison.md"} <= found
    assert {"conditions.json", "base", "search", "curve"} <= found
    [config, _] = sorted(Path("out/runs/lora").glob("*/config.yaml"))
    assert yaml.safe_load(config.read_text())["data"] == str(rows)
    again = spectune(*command, "--output-dir", "out", "--resume")
    assert again.exit_code == 0, again.stderr
    assert "BitFit" in again.stdout
    written = spectune("generate", "number 1", "--run", "out", "--max-new-tokens", "2")
    assert written.exit_code == 0, written.stderr
    Path("out/comparison.json").unlink()
    report = spectune("report", "out", "--json", "--max-memory", "1B")
    assert report.exit_code == 0, report.stderr
    anew = json.loads(report.stdout)
    assert anew["runs"] == answer["runs"]
    assert anew["recommendation"]["limits"]["max_memory_bytes"] == 1
    assert json.loads(Path("out/comparison.json").read_text())["runs"] == answer["runs"]
    assert spectune("report", rows.parent).exit_code == 3


def test_compare_with_a_failed_run_is_exit_1(spectune: Spectune, base: Path, rows: Path) -> None:
    command = ("compare", "--model", base, "--data", rows, "--methods", "lora,bitfit", *QUICK)
    result = spectune(*command, *UNPLANNED, "--set", "lora.target_modules=[nothing]", "--seeds", "1", "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert [run["method"] for run in answer["runs"]] == ["bitfit"]
    assert [run["method"] for run in answer["failed"]] == ["lora"]
    assert "'nothing' matches no linear" in result.stderr


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (("--fractions", "a,b"), 2, "fractions is 'a,b'; expected numbers"),
        (("--fractions", "0"), 2, "fractions 0; expected shares"),
        (("--metric", "bleurt"), 2, "metric 'bleurt'"),
        (("--max-memory", "lots"), 2, "--max-memory lots: expected a size above zero, such as 24GiB"),
        (("--max-latency-overhead", "x"), 2, "--max-latency-overhead x: expected a share"),
        (("--quick", "--thorough"), 2, "--quick and --thorough"),
        (("--set", "seeds=two"), 2, "seeds is 'two'; expected a whole number"),
        (("--test", "nosuch.jsonl"), 3, "nosuch.jsonl"),
    ],
)
def test_compare_with_wrong_flags(
    spectune: Spectune, base: Path, rows: Path, flags: tuple[str, ...], code: int, expected: str
) -> None:
    result = spectune("compare", "--model", base, "--data", rows, *flags)
    assert result.exit_code == code, result.stderr
    assert expected in result.stderr
    assert not Path("runs").exists()


def test_compare_dry_run(spectune: Spectune, base: Path, rows: Path) -> None:
    result = spectune("compare", "--model", base, "--data", rows, "--dry-run", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["runs"]) == len(METHODS)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (("--test", "nosuch.jsonl"), 3, "nosuch.jsonl"),
        (("--metric", "accuracy"), 3, "metric accuracy: no row has"),
        (("--metric", "bleurt"), 2, "metric 'bleurt'"),
        (("--fractions", "0"), 2, "fractions 0; expected shares"),
        (("--set", "preset=fast"), 2, "preset 'fast'"),
    ],
)
def test_compare_dry_run_finds_what_the_run_would(
    spectune: Spectune, base: Path, tmp_path: Path, flags: tuple[str, ...], code: int, expected: str
) -> None:
    rows = tmp_path / "unlike.jsonl"
    lines = [{"prompt": f"number {i}", "completion": f" is {i * i}"} for i in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("compare", "--model", base, "--data", rows, "--methods", "bitfit", "--dry-run", "--device", "cpu")
    result = spectune(*command, *flags)
    assert result.exit_code == code, result.stderr
    assert expected in result.stderr


def test_env(spectune: Spectune) -> None:
    found = json.loads(spectune("env", "--json").stdout)
    assert found["versions"]["torch"]
    assert "cpu" in found["devices"]
    assert "lora" in found["methods"]
    assert "torch" in spectune("env").stdout


def test_python_m_spectune_answers_without_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['spectune', '--help']\ntry: runpy.run_module('spectune', run_name='__main__')"
    )
    code += "\nexcept SystemExit as e: assert not e.code, e.code\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    assert "spectune compare --quick" in result.stdout


def test_help_of_every_command_lists_every_method(spectune: Spectune) -> None:
    from spectune.cli.known_keys import method_names
    from spectune.methods import BY_NAME

    assert set(method_names().split(", ")) == set(BY_NAME)
    for command in ("compare", "train", "generate", "eval", "merge", "export", "report", "validate", "env", "doctor"):
        result = spectune(command, "--help")
        assert result.exit_code == 0
        assert "xamples:" in result.stdout
