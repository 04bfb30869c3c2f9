from __future__ import annotations

import math

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spectune.data import encode, load_rows
from spectune.errors import DataError
from spectune.evaluation import RowLosses, perplexity, row_losses


def test_the_mean_weighs_tokens_not_rows() -> None:
    losses = RowLosses((2.0, 9.0), (1, 9))
    assert losses.mean_per_token == 1.1
    assert perplexity(losses.mean_per_token) == math.exp(1.1)


def test_rows_of_a_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = load_rows([{"prompt": "w5 w6", "completion": " w8 w9"}, {"prompt": "w1", "completion": " w2"}])
    examples = encode(rows, tokenizer, max_length=32).examples
    both = row_losses(model, examples, 0)
    assert both.target_tokens == (3, 2)
    alone = [row_losses(model, [example], 0).loss_sums[0] for example in examples]
    assert both.loss_sums == pytest.approx(alone, rel=1e-5)


def test_no_target_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(DataError, match="0 rows without a single target token"):
        row_losses(model, [], 0)
