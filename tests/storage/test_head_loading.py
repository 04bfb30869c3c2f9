"""Bases with heads: loaded by name, with a head that the checkpoint has, or a seeded one and a line that says so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2ForSequenceClassification, GPT2ForTokenClassification

import spectune
from spectune.errors import ConfigError
from spectune.storage import load
from tests.support import make_model, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model's."""
    path = tmp_path_factory.mktemp("base")
    model = make_model()
    model.config.pad_token_id = None
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_a_head_that_the_checkpoint_lacks_is_the_same_for_the_same_seed(
    folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    head: dict[str, Any] = {"task_type": "SEQ_CLS", "id2label": ["no", "yes", "maybe"]}
    with caplog.at_level(logging.INFO, logger="spectune"):
        model, tokenizer = load(folder, **head, seed=5)
    said = [record.message for record in caplog.records if record.name == "spectune"]
    assert len(said) == 1
    assert "SEQ_CLS with 3 outputs: score.weight begins at random (seed 5)" in said[0]
    assert "newly initialized" not in capfd.readouterr().err
    assert type(model) is GPT2ForSequenceClassification
    assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert model.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert model.config.pad_token_id == tokenizer.pad_token_id
    torch.rand(3)
    again, other = load(folder, **head, seed=5)[0], load(folder, **head, seed=6)[0]
    assert torch.equal(model.score.weight, again.score.weight)
    assert not torch.equal(model.score.weight, other.score.weight)
    base = make_model().transformer.state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.transformer.state_dict().items())


def test_a_head_that_the_checkpoint_has_is_kept(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = load(folder, task_type="TOKEN_CLS", num_labels=4)
    assert type(model) is GPT2ForTokenClassification
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="spectune"):
        again, _ = load(tmp_path, task_type="TOKEN_CLS", seed=9)
        assert torch.equal(again.classifier.weight, model.classifier.weight)
        assert not caplog.records
        fewer, _ = load(tmp_path, task_type="TOKEN_CLS", num_labels=2)
    assert fewer.classifier.weight.shape == (2, 32)
    assert "TOKEN_CLS with 2 outputs: classifier.bias and classifier.weight begins" in caplog.text


def test_one_output_is_a_regression(folder: Path) -> None:
    model, _ = spectune.load(folder, task_type="SEQ_CLS", num_labels=1)
    delta = spectune.attach(model, spectune.LoRA(r=2), "task")
    assert model.score.weight.shape == (1, 32)
    assert "score.weight" in delta.state_dict()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"task_type": "SEQ_CLASS"}, "expected one of CAUSAL_LM, SEQ_CLS, TOKEN_CLS"),
        ({"num_labels": 3}, "num_labels: of a head, and task_type is CAUSAL_LM"),
        ({"task_type": "SEQ_CLS", "num_labels": 2, "id2label": ["a"]}, "id2label has 1 names"),
        ({"task_type": "SEQ_CLS", "num_labels": 0}, "expected one or more"),
        ({"task_type": "SEQ_CLS", "num_labels": 3, "problem_type": "multi_label_classification"}, "not trained here"),
    ],
)
def test_settings_that_exclude_each_other_are_said(folder: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(folder, **given)


def test_a_model_given_as_an_object_keeps_its_head() -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="the model given is a GPT2LMHeadModel for CAUSAL_LM"):
        load(model, task_type="SEQ_CLS", num_labels=2)
