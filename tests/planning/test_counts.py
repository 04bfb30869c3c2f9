"""Counts from configs, against figures computed by hand and against real tensors."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from spectune.deltas import Method, attach
from spectune.methods import (
    METHODS,
    BitFit,
    BottleneckAdapter,
    FullFineTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
)
from spectune.planning import count, reference_shares


@pytest.mark.parametrize(
    ("method", "stored"),
    [
        (FullFineTuning(), 124_439_808),
        (PrefixTuning(num_virtual_tokens=20), 368_640),
        (PromptTuning(num_virtual_tokens=20), 15_360),
        (BottleneckAdapter(bottleneck_dim=64, placement="block"), 1_189_632),
        (BitFit(), 102_144),
        (LoRA(r=16), 2_359_296),
    ],
)
def test_gpt2_124m(method: Method, stored: int) -> None:
    assert count(GPT2Config(), method).stored == stored


def test_llama_3_8b_by_hand() -> None:
    shapes = {str(row["model"]): row for row in reference_shares([LoRA(r=16), PrefixTuning(num_virtual_tokens=20)])}
    llama = shapes["Llama-3-8B"]
    assert llama["total_parameters"] == 8_030_261_248
    hidden, kv, ffn = 4096, 1024, 14336
    per_layer = 2 * (hidden + hidden) + 2 * (hidden + kv) + 2 * (hidden + ffn) + (ffn + hidden)
    assert llama["shares"]["lora"]["parameters"] == 16 * 32 * per_layer == 41_943_040
    assert llama["shares"]["prefix"]["parameters"] == 20 * 32 * 2 * 1024


SMALL = {
    "gpt2": GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=3, n_positions=32, bos_token_id=0, eos_token_id=0),
    "llama": LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        max_position_embeddings=32,
    ),
}


@pytest.mark.parametrize("family", list(SMALL))
@pytest.mark.parametrize("method", [*(m() for m in METHODS), PrefixTuning(prefix_projection=True)], ids=str)
def test_counts_equal_the_real_tensors(family: str, method: Method) -> None:
    counted = count(SMALL[family], method)
    model = AutoModelForCausalLM.from_config(SMALL[family])
    delta = attach(model, method)
    assert counted.trained == delta.num_trained_parameters() == sum(p.numel() for p in delta.parameters())
    assert counted.stored == delta.num_parameters() == sum(t.numel() for t in delta.state_dict().values())
    assert all(p.dtype == torch.float32 for p in delta.parameters())
