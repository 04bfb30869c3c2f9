"""Training models with heads: steps weigh rows, a run goes on bit for bit, and its plan is what it took."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2ForTokenClassification, PreTrainedModel

import spectune.training.loop as loop_module
from spectune.deltas import Method, attach
from spectune.errors import InterruptedRun
from spectune.methods import IA3, METHODS, LoRA
from spectune.results import RunResult
from spectune.training import Run, TrainingConfig, train, train_together
from tests.support import make_tokenizer
from tests.support.two_processes import interrupt_after

RNG = random.Random(0)
WORDS = ["Ada", "lives", "in", "Leeds", "name", "town", "York", "home"]
TEXTS = [
    {"text": " ".join(RNG.choices(WORDS, k=RNG.randint(2, 9))) + (" fox" if n % 2 else " dog"),
     "label": "fox" if n % 2 else "dog"}
    for n in range(24)
]  # fmt: skip
TAGGED = [
    {"tokens": words, "tags": ["B-LOC" if w in ("Leeds", "York") else "O" for w in words]}
    for words in (RNG.choices(WORDS, k=RNG.randint(2, 9)) for _ in range(24))
]


def make(kind: str, labels: list[str]) -> PreTrainedModel:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, classifier_dropout=0.0, num_labels=len(labels) or 1,
    )  # fmt: skip
    if labels:
        config.id2label = dict(enumerate(labels))
    return (GPT2ForTokenClassification if kind == "words" else GPT2ForSequenceClassification)(config).eval()


def run(kind: str, method: Any = None, **settings: Any) -> RunResult:
    rows, labels = {
        "text": (TEXTS, ["dog", "fox"]),
        "words": (TAGGED, ["B-LOC", "O"]),
        "numbers": ([{**row, "label": len(row["text"]) / 50} for row in TEXTS], []),
    }[kind]
    how = {"per_device_train_batch_size": 8, "max_length": 40, "learning_rate": 1e-2, **settings}
    return train(make(kind, labels), make_tokenizer(), method or LoRA(r=2), rows[:16], rows[16:], TrainingConfig(**how))


@pytest.mark.parametrize("kind", ["text", "words", "numbers"])
def test_a_head_learns(kind: str) -> None:
    result = run(kind, max_steps=12, eval_steps=12, memory_check="refuse")
    assert result.valid_loss is not None
    assert result.base_valid_loss is not None
    assert result.valid_loss < 0.8 * result.base_valid_loss
    assert result.trainable_parameters == result.stored_parameters


def test_heads_learn_in_a_shared_pass_what_they_learn_alone() -> None:
    how: dict[str, Any] = {"max_length": 40, "max_steps": 3, "memory_check": "off"}
    runs = [
        Run(LoRA(r=2), TAGGED[:16], TAGGED[16:], TrainingConfig(**how, per_device_train_batch_size=5), "lora"),
        Run(IA3(), TAGGED[:9], TAGGED[16:], TrainingConfig(**how, gradient_accumulation_steps=2), "ia3"),
    ]
    base = make("words", ["B-LOC", "O"]).double()
    found = train_together(base, make_tokenizer(), runs, share_passes=True)
    for each, result in zip(runs, found, strict=True):
        model = make("words", ["B-LOC", "O"]).double()
        alone = train(model, make_tokenizer(), each.method, each.train_rows, each.valid_rows, each.config)
        assert result.valid_loss == pytest.approx(alone.valid_loss, abs=1e-6)
        assert result.train_loss == pytest.approx(alone.train_loss, abs=1e-6)


@pytest.mark.parametrize("kind", ["text", "words"])
def test_how_rows_are_spread_over_batches_changes_nothing(kind: str) -> None:
    """Sums over rows (or scored words), divided once by those of the step."""
    whole = run(kind, max_steps=3, eval_steps=3, per_device_train_batch_size=16)
    parts = run(kind, max_steps=3, eval_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert parts.train_loss == pytest.approx(whole.train_loss, rel=1e-4)
    assert parts.valid_loss == pytest.approx(whole.valid_loss, rel=1e-4)


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "eval_steps": 3}
    whole = run("text", **settings, output_dir=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.Loop, "finish", interrupt_after(4))
        with pytest.raises(InterruptedRun):
            run("text", **settings, output_dir=tmp_path / "parts")
    parts = run("text", **settings, output_dir=tmp_path / "parts", resume=True)
    assert parts.valid_loss == whole.valid_loss
    mine, other = (load_file(tmp_path / who / "best" / "adapter_model.safetensors") for who in ("whole", "parts"))
    assert "base_model.model.score.weight" in mine
    assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("method", [kind() for kind in METHODS], ids=lambda method: str(method.name))
def test_every_method_trains_its_head(method: Any) -> None:
    result = run("text", method, max_steps=4, eval_steps=4, learning_rate=5e-3)
    assert result.valid_loss is not None
    assert result.base_valid_loss is not None
    assert result.valid_loss < result.base_valid_loss


@pytest.mark.parametrize("method", METHODS, ids=lambda m: str(m.model_fields["name"].default))
def test_a_head_is_not_trained_at_the_rates_of_vectors(method: type[Method]) -> None:
    delta = attach(make("SEQ_CLS", ["a", "b"]), method())
    factors = [module.rate_factor("weight") for site, module in delta.sites if site.path == "score"]
    assert len(factors) == (not method.trains_base)
    for factor in factors:
        assert factor * method.learning_rates.at(32).rate <= 1.001 * LoRA.learning_rates.at(448).rate
