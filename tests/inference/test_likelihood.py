from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spectune.data import Row, encode, load_rows
from spectune.errors import DataError
from spectune.inference import choice_log_likelihoods, row_loss_sums


def rows() -> list[Row]:
    return load_rows(
        [
            {"prompt": "w5 w6 w7", "completion": " w8 w9"},
            {"prompt": "w1", "completion": " w2 w3 w4 w5 w6"},
            {"prompt": "w10 w11 w12 w13", "completion": " w14"},
        ]
    )


@torch.no_grad()
def reference(model: PreTrainedModel, ids: list[int], prompt_length: int) -> float:
    """Minus log p of the targets of one unpadded row, in float64."""
    model.eval()
    log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log_p[t - 1, ids[t]]) for t in range(max(prompt_length, 1), len(ids)))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_row_losses_equal_each_row_alone_in_float64(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    examples = encode(rows(), tokenizer, max_length=32).examples
    sums, counts = row_loss_sums(model, examples, 0, batch_size)
    assert counts == [len(e.input_ids) - e.prompt_length for e in examples] == [3, 6, 2]
    assert all(module.training for module in model.modules())
    expected = [reference(model, list(e.input_ids), e.prompt_length) for e in examples]
    assert sums == pytest.approx(expected, rel=1e-5)


def test_choices_are_scored_as_training_writes_them(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    asked = [
        dataclasses.replace(rows()[0], completion=None, choices=(" w8", " w8 w9", " w3")),
        dataclasses.replace(rows()[1], completion=None, choices=(" w1", " w2")),
    ]
    found = choice_log_likelihoods(model, tokenizer, asked, max_length=32, batch_size=2)
    expected = [
        [-reference(model, [5, 6, 7, *choice, 0], 3) for choice in ([8], [8, 9], [3])],
        [-reference(model, [1, *choice, 0], 1) for choice in ([1], [2])],
    ]
    for scores, wanted in zip(found, expected, strict=True):
        assert scores.log_likelihoods == pytest.approx(wanted, rel=1e-5)
        assert scores.best == max(range(len(wanted)), key=wanted.__getitem__)
    assert [scores.target_tokens for scores in found] == [(2, 3, 2), (2, 2)]


def test_rows_that_ask_nothing_are_all_named(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    without = rows()[0]
    bare = dataclasses.replace(without, prompt=None, completion=None, text="w1 w2", choices=("w1",))
    with pytest.raises(DataError) as caught:
        choice_log_likelihoods(model, tokenizer, [without, bare], max_length=32)
    assert len(caught.value.problems) == 2
    assert "no choices" in caught.value.problems[0]
    assert "no prompt" in caught.value.problems[1]
