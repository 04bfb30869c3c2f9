"""`spectune merge` and what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectune.storage import load, load_delta

Spectune = Callable[..., Any]
Trained = Callable[[str], Path]


def name_valid(run: Path, rows: Path) -> None:
    """Let the run's config.yaml name its validation rows."""
    with (run / "config.yaml").open("a") as file:
        file.write(f"valid: {rows}\n")


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 25).reshape(2, 12)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


@pytest.mark.parametrize("method", ["lora", "bitfit", "full"])
def test_merge_writes_a_plain_folder(spectune: Spectune, trained: Trained, base: Path, rows: Path, method: str) -> None:
    run = trained(method)
    result = spectune("merge", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert f"run: {run}" in result.stderr
    folder = run / "merged"
    assert f"written to {folder}" in result.stdout
    assert f"model = transformers.AutoModelForCausalLM.from_pretrained('{folder}')" in result.stdout
    measured = f"rows: the run's validation rows, held out of {rows}\nlargest logit difference"
    assert (measured in result.stdout) == (method != "full")
    found = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= found
    assert not {"spectune.json", "adapter_config.json"} & found
    assert len(AutoTokenizer.from_pretrained(folder)) == 257
    model, _ = load(base)
    load_delta(model, run / "best")
    expected = logits(model)
    assert float((logits(AutoModelForCausalLM.from_pretrained(folder)) - expected).abs().max()) <= 1e-5
    assert float((logits(load(base)[0]) - expected).abs().max()) > 1e-3
    again = spectune("merge")
    assert again.exit_code == 2
    assert f"{folder} is not empty" in again.stderr


def test_json_is_one_object(spectune: Spectune, trained: Trained, rows: Path) -> None:
    run = trained("lora")
    name_valid(run, rows)
    answer = json.loads(spectune("merge", "--json", "--output-dir", "out/model").stdout)
    assert (answer["run"], answer["folder"], answer["format"]) == (str(run), "out/model", "merged")
    assert answer["measured_on"].startswith("12 real rows (")
    assert answer["measured_on"].endswith(f" of the run's validation rows, {rows}")
    assert 0 <= answer["largest_logit_difference"] <= 1e-5 * answer["largest_logit"]
    assert answer["mean_logit_effect"] > answer["mean_logit_difference"]
    assert not list(Path("out").glob(".*"))
    other = json.loads(spectune("merge", "--json", "--output-dir", "other", "--run", run, "--data", rows).stdout)
    assert other["measured_on"] == answer["measured_on"].replace("the run's validation rows, ", "")


def test_rows_that_are_gone_are_replaced_and_it_is_said(spectune: Spectune, trained: Trained) -> None:
    gone = Path("gone.jsonl")
    name_valid(trained("lora"), gone)
    result = spectune("merge")
    assert result.exit_code == 0, result.stderr
    assert "are not to be had, so the embedded test rows are taken" in result.stderr
    assert "rows: the embedded test rows" in result.stdout


def test_a_full_run_in_another_dtype(spectune: Spectune, trained: Trained) -> None:
    run = trained("full")
    result = spectune("merge", "--dtype", "bfloat16", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert AutoModelForCausalLM.from_pretrained(run / "merged").dtype == torch.bfloat16


def test_low_precision_is_refused_and_nothing_is_written(spectune: Spectune, trained: Trained) -> None:
    run = trained("lora")
    weights = run / "best" / "adapter_model.safetensors"
    save_file({name: tensor * 1e-2 for name, tensor in load_file(weights).items()}, weights)
    (run / "best" / "spectune.json").unlink()  # it has the digest of the weights as they were; PEFT's config is enough
    result = spectune("merge", "--dtype", "bfloat16", "--device", "cpu")
    assert result.exit_code == 2
    assert "rounds the delta away" in result.stderr
    assert not [path for path in run.iterdir() if "merged" in path.name]


@pytest.mark.parametrize("method", ["adapter", "prefix", "prompt"])
def test_what_cannot_be_merged_names_export(spectune: Spectune, trained: Trained, method: str) -> None:
    run = trained(method)
    result = spectune("merge")
    assert result.exit_code == 2
    assert "cannot be merged" in result.stderr
    assert f"spectune export --run {run}" in result.stderr
    assert not (run / "merged").exists()


def test_a_folder_that_is_not_a_deltas_is_exit_3(spectune: Spectune, trained: Trained) -> None:
    run = trained("lora")
    for content in ("{", "{}", '{"method": {"name": "none"}}'):
        (run / "best" / "spectune.json").write_text(content)
        result = spectune("merge")
        assert result.exit_code == 3, result.stderr
        assert "spectune.json" in result.stderr
