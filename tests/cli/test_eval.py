"""What `spectune eval` measures when asked for it by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.conftest import Spectune, Trained

from spectune.comparing import measure


@pytest.fixture
def run(trained: Trained) -> Path:
    """A finished run, the newest under runs/."""
    return trained("lora")


def test_metrics_by_name_and_ones_own(spectune: Spectune, run: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def length(prediction, references, row):\n    return len(references[0])\n")
    few = ("--data", rows, "--generate-rows", "4", "--max-new-tokens", "3", "--json")
    result = spectune("eval", *few, "--metric", "exact_match,own.py:length")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    for side in ("tuned", "base"):
        assert set(answer[side]) == {
            *("loss_nats_per_token", "perplexity", "target_tokens", "exact_match", "length", "generated_rows")
        }
        assert answer[side]["length"] == 6.5  # rows 0, 3, 6 and 9: "is even" twice, "is odd" twice
    assert "4 of 12 rows, evenly spaced" in result.stderr


def test_accuracy_finds_the_choices_in_the_rows(spectune: Spectune, run: Path, rows: Path) -> None:
    result = spectune("eval", "--data", rows, "--metric", "accuracy", "--json")
    assert result.exit_code == 0, result.stderr
    tuned = json.loads(result.stdout)["tuned"]
    assert set(tuned) == {"loss_nats_per_token", "perplexity", "target_tokens", "choice_accuracy"}
    assert tuned["choice_accuracy"] * 12 == pytest.approx(round(tuned["choice_accuracy"] * 12))
    assert "2 choices, inferred" in result.stderr


def test_the_loss_alone(spectune: Spectune, run: Path, rows: Path) -> None:
    tuned = json.loads(spectune("eval", "--data", rows, "--metric", "loss", "--json").stdout)["tuned"]
    assert set(tuned) == {"loss_nats_per_token", "perplexity", "target_tokens"}


def test_eval_and_compare_measure_alike(
    spectune: Spectune, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same weights and rows: answers longer than 64 tokens, and choices by their bytes."""
    for name, few in {"PASSAGES": 2, "PASSAGE_TOKENS": 8, "DECODE_TOKENS": 3, "ROUNDS": 1}.items():
        monkeypatch.setattr(measure, name, few)  # speed and forgetting are no part of this
    monkeypatch.setattr("spectune.comparing.comparison.write_reports", lambda content, folder: [])
    long = " ".join(f"number {i}" for i in range(9))
    rows: list[dict[str, Any]] = [{"prompt": f"count {i}:", "completion": f" {long}"} for i in range(3)]
    choices = {"choices": ["even", "odd"]}
    rows += [{"prompt": f"number {i}", "completion": f" {choices['choices'][i % 2]}", **choices} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--model", base, "--data", "rows.jsonl", "--valid", "rows.jsonl", "--device", "cpu", "--seeds", "1")
    rates = ("--set", "max_steps=2", "--set", "learning_rate=1e-2", "--set", "memory_check=warn")
    byte = ("--choice-normalization", "byte", "--generate-rows", "3")
    compared = spectune("compare", "--methods", "bitfit", *given, *rates, *byte, "--output-dir", "c", "--json")
    assert compared.exit_code == 0, compared.stderr
    answer = json.loads(compared.stdout)
    assert "likelihood per UTF-8 byte" in answer["data"]["task"]
    assert yaml.safe_load((tmp_path / "c" / "config.yaml").read_text())["choice_normalization"] == "byte"
    [run] = (tmp_path / "c" / "runs" / "bitfit").glob("seed-0-*")
    result = spectune("eval", "--run", run, "--data", "rows.jsonl", "--device", "cpu", *byte, "--json")
    assert result.exit_code == 0, result.stderr
    assert answer["data"]["task"] in result.stderr
    tuned = json.loads(result.stdout)["tuned"]
    [arm] = answer["runs"]
    names = {"choice_accuracy": "accuracy"}
    metrics = {names.get(key, key): value for key, value in tuned.items()}
    assert arm["metrics"] == {key: pytest.approx(metrics[key]) for key in arm["metrics"]}
    assert arm["judged_loss"] == pytest.approx(tuned["loss_nats_per_token"])
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert (kept["split_seed"], kept["choice_normalization"], kept["generate_rows"]) == (0, "byte", 3)
    by_itself = spectune("eval", "--run", run, "--device", "cpu", "--json")  # with nothing said, as the comparison did
    assert answer["data"]["task"] in by_itself.stderr
    assert json.loads(by_itself.stdout)["tuned"] == tuned
    labels = {"accuracy", "macro_f1", "matthews"}
    assert set(arm["metrics"]) == {*labels, "exact_match", "rouge_l", "bleu", "chrf"}


def test_an_answer_that_is_no_choice_is_named_by_file_and_line(spectune: Spectune, run: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": answer, "choices": ["yes", "no"]} for answer in (" yes", "maybe")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = spectune("eval", "--run", run, "--data", "rows.jsonl")
    assert result.exit_code == 3
    assert "rows.jsonl:2: its answer is 'maybe'; expected one of 'yes', 'no'" in result.stderr
    assert "rows.jsonl:1" not in result.stderr


def test_an_unknown_normalization(spectune: Spectune, run: Path, rows: Path) -> None:
    for command in (("eval", "--run", run), ("compare", "--dry-run")):
        result = spectune(*command, "--data", rows, "--choice-normalization", "mean")
        assert result.exit_code == 2
        assert "choice_normalization 'mean'" in result.stderr
        assert "expected one of sum, token, byte" in result.stderr


def test_an_unknown_metric(spectune: Spectune, run: Path, rows: Path) -> None:
    result = spectune("eval", "--data", rows, "--metric", "bleau")
    assert result.exit_code == 2
    assert "did you mean 'bleu'" in result.stderr


def test_lm_eval_that_is_not_installed(
    spectune: Spectune, run: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a))
    result = spectune("eval", "--data", rows, "--lm-eval-tasks", "hellaswag")
    assert result.exit_code == 2
    assert "pip install 'spectune[lm-eval]'" in result.stderr
