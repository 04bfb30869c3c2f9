"""A head beside the label's words, as arms of one comparison; and methods with heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from spectune import Arm, ConfigError, DataError, LoRA, TrainingConfig, compare
from spectune.comparing import Comparison
from spectune.evaluation import read_rows
from tests.comparing.small import QUIET
from tests.support import make_tokenizer

TRAIN = [{"text": f"day {i} was {'fine' if i % 2 else 'wet'}", "label": "good" if i % 2 else "bad"} for i in range(24)]
CONFIG = TrainingConfig(max_steps=4, learning_rate=1e-2, per_device_train_batch_size=4, memory_check="off")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("base"), make_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compared(base: Path, folder: Path, methods: Any, rows: Any = TRAIN, **changes: Any) -> Comparison:
    given = {"config": CONFIG, "seeds": 1, "console": QUIET, "output_dir": folder, "device": "cpu", **changes}
    return compare(str(base), rows[:16], rows[16:], methods=methods, **given)


@pytest.mark.usefixtures("short_measurements", "with_reports")
def test_a_head_and_the_label_s_words_are_decided_by_accuracy_on_the_same_rows(base: Path, tmp_path: Path) -> None:
    arms = {"LoRA words": Arm("", LoRA(r=2), task_type="causal-lm"), "LoRA head": LoRA(r=2)}
    found = compared(base, tmp_path / "c", arms)
    assert found.failed == []
    words, head = (found.result.runs_by_arm[name][0] for name in ("LoRA-words", "LoRA-head"))
    assert (words.label, head.label) == ("LoRA words", "LoRA head")
    assert (words.task_type, head.task_type) == ("CAUSAL_LM", "SEQ_CLS")
    assert set(words.metrics) == set(head.metrics) == {"accuracy", "macro_f1", "matthews"}
    # the same rows, the same labels, and a loss of its own for each
    judged = [read_rows(tmp_path / "c" / str(run.rows_file)) for run in (words, head)]
    assert [row.origin for row in judged[0]] == [row.origin for row in judged[1]]
    assert [row.references for row in judged[0]] == [row.references for row in judged[1]]
    assert {row.target_tokens for row in judged[1]} == {1}
    verdict = found.result.verdict
    assert verdict is not None
    assert (verdict.measure, verdict.higher_is_better, verdict.base) == ("accuracy", True, None)
    assert {arm.name: arm.mean for arm in verdict.arms} == {
        run.name: pytest.approx(run.metrics["accuracy"]) for run in (words, head)
    }
    assert any(line.startswith("Decided by accuracy: the losses") for line in verdict.sentences)
    # what a head has no meaning for is not there, and the page says so
    assert head.forgetting_kl_nats_per_token is head.valid_perplexity is head.decode_tokens_per_second is None
    assert words.forgetting_kl_nats_per_token is not None
    page = (tmp_path / "c" / "report.html").read_text()
    for told in ("Own loss", "A head writes no text and has no vocabulary", "1 - accuracy"):
        assert told in page
    assert "| Untrained head |" in (tmp_path / "c" / "comparison.md").read_text()
    # it goes on where it is, with both kinds of model
    again = compared(base, tmp_path / "c", arms, resume=True)
    assert [run.judged_loss for run in again.result.runs] == [run.judged_loss for run in found.result.runs]


@pytest.mark.usefixtures("short_measurements", "with_reports")
def test_methods_with_heads_are_compared_by_their_loss(base: Path, tmp_path: Path) -> None:
    rows = [{"text": "x" * (i % 7 + 1), "label": i % 7 / 2} for i in range(24)]
    found = compared(base, tmp_path / "c", [LoRA(r=2), "bitfit"], rows)
    assert found.failed == []
    data = found.result.data
    assert (data.decided_by, data.loss_unit) == ("judged_loss", "squared error")
    assert data.higher_is_better == {"mse": False, "pearson": True}
    for run in found.result.runs:
        assert run.metrics["mse"] == pytest.approx(run.judged_loss)
    page = (tmp_path / "c" / "report.html").read_text()
    assert "Losses are squared error" in page
    assert "Perplexity" not in page
    table = (tmp_path / "c" / "comparison.md").read_text()
    assert "Forgetting" not in table
    assert json.loads((tmp_path / "c" / "comparison.json").read_text())["arms"][0]["task_type"] == "SEQ_CLS"


def test_arms_that_nothing_decides_between_are_refused(base: Path, tmp_path: Path) -> None:
    numbers = [{"text": "x", "label": i / 3} for i in range(24)]
    both = [LoRA(r=2), Arm("words", LoRA(r=2), task_type="CAUSAL_LM")]
    with pytest.raises(ConfigError, match="have no measure in common"):
        compared(base, tmp_path / "numbers", both, numbers)
    answers = [{"prompt": f"number {i}", "completion": f" is {i}"} for i in range(24)]
    with pytest.raises(DataError, match="the label 'is 16' is none of the classes"):
        compared(base, tmp_path / "answers", [LoRA(r=2), Arm("head", LoRA(r=2), task_type="SEQ_CLS")], answers)
    with pytest.raises(ConfigError, match="arm x: task_type = 'seq'; expected auto or one of CAUSAL_LM"):
        compared(base, tmp_path / "seq", [Arm("x", LoRA(), task_type="seq")])
