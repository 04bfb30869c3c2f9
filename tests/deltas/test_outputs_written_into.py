"""Bases that write into a linear's output in place: what a delta keeps of it for its backward pass stays as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

from spectune.deltas import Method, attach
from spectune.methods import METHODS, PrefixTuning
from tests.contract.conftest import tokens


# prefix tuning is refused there: its attention is its own
@pytest.mark.parametrize(
    "method",
    [method for method in METHODS if method is not PrefixTuning],
    ids=lambda m: str(m.model_fields["name"].default),
)
def test_every_method_has_its_gradients_there(method: type[Method]) -> None:
    torch.manual_seed(0)
    config = FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, parallel_attn=True, bias=False
    )
    model = FalconForCausalLM(config)
    delta = attach(model, method())
    model(input_ids=tokens(2, 6), labels=tokens(2, 6)).loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in delta.parameters())
