"""What `spectune eval` measures when asked for it by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tests.cli.conftest import Spectune, Trained


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
