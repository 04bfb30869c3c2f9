"""Objectives of heads: their losses are transformers' own, whatever the batch is filled up with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
)

from spectune.data.batching import filled
from spectune.objectives import CAUSAL_LM, SEQ_CLS, SEQ_REGRESSION, TOKEN_CLS, objective_of

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "pad_token_id": 0}  # fmt: skip


def text(labels: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=labels)).eval()


def words() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForTokenClassification(LlamaConfig(**SIZES, num_labels=3)).eval()


def rows(labels: Tensor, padding: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(1, 97, (3, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((8, 5, 6)):
        ids[row, length:], mask[row, length:] = padding, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


CLASSES, NUMBERS = torch.tensor([2, 0, 1]), torch.tensor([0.5, -1.0, 3.0])
TAGS = torch.tensor([[0, 1, -100, 2, 2, 1, 0, -100], [1, -100, 0, 0, 2, -100, -100, -100], [2] * 6 + [-100] * 2])


@pytest.mark.parametrize(
    ("model", "labels", "targets"), [(text(), CLASSES, 3), (text(1), NUMBERS, 3), (words(), TAGS, 16)]
)
def test_the_loss_is_transformers_own(model: PreTrainedModel, labels: Tensor, targets: int) -> None:
    batch, objective = rows(labels), objective_of(model)
    expected = model(**batch).loss.double()
    objective.precompute(batch)
    total, count = objective.loss_sum(model, batch)
    assert count == targets
    total = total.detach()
    assert abs(float(total) / count - float(expected.detach())) < 1e-6
    found = objective.token_losses(model, batch)
    assert abs(float(found.losses.detach().double().sum()) - float(total)) < 1e-5
    assert found.rows.tolist() == sorted(found.rows.tolist())
    assert torch.bincount(found.rows).tolist() == ([1, 1, 1] if labels.dim() == 1 else [6, 4, 6])


def test_one_objective_for_each_head() -> None:
    assert objective_of(text()) is SEQ_CLS
    assert objective_of(text(1)) is SEQ_REGRESSION
    assert objective_of(words()) is TOKEN_CLS
    assert objective_of(LlamaForCausalLM(LlamaConfig(**SIZES))) is CAUSAL_LM
    assert [o.task_type for o in (CAUSAL_LM, SEQ_CLS, TOKEN_CLS)] == ["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"]


def test_the_last_token_is_found_whatever_stands_behind_it() -> None:
    """A tokenizer may fill up with another id than the config names."""
    expected = SEQ_CLS.token_losses(text(), rows(CLASSES)).losses
    found = SEQ_CLS.token_losses(text(), rows(CLASSES, padding=5)).losses
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("model", "labels"), [(text(), CLASSES), (text(1), NUMBERS), (words(), TAGS)])
def test_rows_and_tokens_that_fill_up_a_batch_are_nobodys(model: PreTrainedModel, labels: Tensor) -> None:
    """CUDA graphs take batches of few shapes."""
    objective = objective_of(model)
    expected, count = objective.loss_sum(model, rows(labels))
    more = filled(rows(labels), 5, 11, 0)
    assert more["input_ids"].shape == (5, 11)
    objective.precompute(more)
    found, same = objective.loss_sum(model, more)
    assert same == count
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert math.isfinite(float(found.detach()))
    assert objective.label_shape(5, 11) == more["labels"].shape


def test_a_loss_of_half_precision_is_taken_in_float32() -> None:
    model = text().bfloat16()
    batch = rows(CLASSES)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits.double(), CLASSES, reduction="sum")
    found, _ = SEQ_CLS.loss_sum(model, batch)
    assert found.dtype is torch.float32
    assert abs(float(found.detach()) - float(expected.detach())) < 1e-5
