"""What `eval` and `generate` take where little is said: the run's own rows, and a model as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.cli.conftest import Spectune, Trained
from transformers import AutoModelForCausalLM

from spectune.data import load_rows, split_rows
from spectune.deltas import merge
from spectune.storage import load, load_delta, write_model

FEW = ("--device", "cpu", "--max-new-tokens", "2", "--json")


@pytest.fixture
def run(trained: Trained) -> Path:
    """A finished run on a file, the newest under runs/."""
    return trained("lora")


def answer(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def recorded(run: Path, **keys: Any) -> None:
    """Change the run's config.yaml."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, **keys}))


def test_a_runs_own_validation_rows_are_the_default(spectune: Spectune, run: Path, rows: Path) -> None:
    held_out = split_rows(load_rows(rows), seed=0)[1]
    found = spectune("eval", *FEW)
    measured = answer(found)
    assert measured["data"] == f"the run's validation rows, held out of {rows}"
    assert f"run: {run}; rows: the run's validation rows" in found.stderr
    result = json.loads((run / "result.json").read_text())
    assert measured["rows"] == len(held_out) == 1
    assert measured["tuned"]["loss_nats_per_token"] == pytest.approx(result["valid_loss"], rel=1e-5)
    found = spectune("generate", *FEW)
    assert [output["prompt"] for output in answer(found)["outputs"]] == [held_out[0].prompt]
    assert "rows: the run's validation rows" in found.stderr


def test_the_split_is_the_one_that_the_run_was_given(spectune: Spectune, run: Path, rows: Path) -> None:
    """Runs of a comparison have seeds of their own, and one split."""
    recorded(run, seed=5, split_seed=3)
    [expected] = split_rows(load_rows(rows), seed=3)[1]
    [other] = split_rows(load_rows(rows), seed=5)[1]
    assert expected.prompt != other.prompt
    [output] = answer(spectune("generate", *FEW))["outputs"]
    assert output["prompt"] == expected.prompt


def test_test_rows_come_before_validation_rows(spectune: Spectune, run: Path, rows: Path, tmp_path: Path) -> None:
    for name in ("valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": " row"}) + "\n")
        recorded(run, **{name: f"{name}.jsonl"})
        [output] = answer(spectune("generate", *FEW))["outputs"]
        assert output["prompt"] == name
    assert answer(spectune("eval", *FEW))["data"] == "the run's test rows, test.jsonl"


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_rows_that_are_gone_are_one_clear_error(spectune: Spectune, run: Path, command: str) -> None:
    recorded(run, data="gone.jsonl")
    result = spectune(command)
    assert result.exit_code == 3
    assert f"the rows that {run} was judged on" in result.stderr
    assert "gone.jsonl: no such file" in result.stderr
    assert "--data" in result.stderr


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_delta_that_does_not_say_its_rows_asks_for_them(spectune: Spectune, run: Path, command: str) -> None:
    shutil.copytree(run / "best", "alone")
    result = spectune(command, "--run", "alone")
    assert result.exit_code == 2
    assert "nothing in alone says which rows" in result.stderr
    assert "--data" in result.stderr


def test_a_runs_best_folder_is_the_run(spectune: Spectune, run: Path) -> None:
    assert answer(spectune("eval", "--run", run / "best", *FEW))["run"] == str(run)


def test_a_model_alone_is_taken_as_it_is(spectune: Spectune, run: Path, base: Path, rows: Path) -> None:
    """Never with the newest run's delta on it."""
    model, tokenizer = load(base)
    load_delta(model, run / "best", name="run")
    write_model(merge(model, "run"), tokenizer, Path("merged"))
    given = ("--data", rows, "--metric", "exact_match", *FEW)
    of_run = answer(spectune("eval", *given))
    bare = answer(spectune("eval", "--model", base, *given))
    merged = answer(spectune("eval", "--model", "merged", *given))
    assert (bare["run"], bare["tuned"]) == (None, None)
    assert bare["base"] == pytest.approx(of_run["base"])
    assert merged["base"]["loss_nats_per_token"] == pytest.approx(of_run["tuned"]["loss_nats_per_token"], rel=1e-5)
    said = spectune("generate", "number 3", "--model", "merged", *FEW)
    assert (
        answer(said)["outputs"][0]["completion"]
        == answer(spectune("generate", "number 3", *FEW))["outputs"][0]["completion"]
    )
    assert "model: merged, as it is" in said.stderr
    table = spectune("eval", "--model", "merged", "--data", rows, *FEW[:-1])
    assert "bare base" not in table.stdout


def test_a_deltas_folder_as_the_model_is_on_its_own_base(spectune: Spectune, run: Path, base: Path, rows: Path) -> None:
    of_run = answer(spectune("eval", "--data", rows, *FEW))
    ours = Path(shutil.copytree(run / "best", "ours"))
    theirs = Path(shutil.copytree(run / "best", "theirs"))
    (theirs / "spectune.json").unlink()  # what is left is PEFT's
    config = json.loads((theirs / "adapter_config.json").read_text())
    (theirs / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    for folder in (ours, theirs):
        found = answer(spectune("eval", "--model", folder, "--data", rows, *FEW))
        assert found["tuned"] == pytest.approx(of_run["tuned"])
        assert found["run"] == str(folder)


def test_a_runs_folder_as_the_model_is_refused(spectune: Spectune, run: Path) -> None:
    result = spectune("eval", "--model", run)
    assert result.exit_code == 2
    assert "name it with --run" in result.stderr


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_run_on_another_base_is_refused_by_name(
    spectune: Spectune, run: Path, base: Path, rows: Path, command: str
) -> None:
    other = AutoModelForCausalLM.from_pretrained(base)
    torch.nn.init.normal_(other.transformer.wte.weight)
    shutil.copytree(base, "other")
    other.save_pretrained("other")
    result = spectune(command, "--run", run, "--model", "other", "--data", rows, *FEW)
    assert result.exit_code == 3
    assert f"--model other with --run {run}" in result.stderr
    assert "was trained on another base" in result.stderr


@pytest.mark.parametrize("command", ["eval", "generate", "merge", "export"])
def test_a_model_given_as_a_run_is_named_as_what_it_is(spectune: Spectune, base: Path, command: str) -> None:
    result = spectune(command, "--run", base)
    assert result.exit_code == 3
    assert f"{base} is a model and no run" in result.stderr
    assert f"--model {base}" in result.stderr


@pytest.mark.parametrize("command", [("report",), ("recommend", "--run")])
def test_a_run_given_as_a_comparison_is_named_as_what_it_is(
    spectune: Spectune, run: Path, base: Path, command: tuple[str, ...]
) -> None:
    assert "this is a single run's" in spectune(*command, run).stderr
    assert f"spectune eval --model {base}" in spectune(*command, base).stderr
