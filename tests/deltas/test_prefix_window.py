"""A prefix and sliding windows: visible from everywhere, or passed by them where PEFT's convention is kept."""

from __future__ import annotations

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from spectune.deltas import attach
from spectune.methods import PrefixTuning

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("sliding", [False, True])
def test_what_of_a_prefix_is_seen_past_a_window(sliding: bool, attention: str) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, intermediate_size=48, sliding_window=4)).eval()
    model.set_attn_implementation(attention)
    delta = attach(model, PrefixTuning(num_virtual_tokens=3, sliding=sliding), "task")
    ids = torch.randint(1, 97, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(input_ids=ids).logits[0]
        for parameter in delta.parameters():
            parameter.mul_(-3)
        after = model(input_ids=ids).logits[0]
    changed = [position for position in range(12) if not torch.equal(before[position], after[position])]
    # of a window of 4 the text's third token (position 2) still sees the prefix's last, the fourth does not
    assert changed == (list(range(3)) if sliding else list(range(12)))
