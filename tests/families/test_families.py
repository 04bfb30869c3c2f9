"""Parts are found by structure, on models of unlike make, from weights and from configs alone."""

from __future__ import annotations

import pytest
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)

from spectune.families import describe, family_from_config
from tests.contract.families import gpt2, llama

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, tuple[PretrainedConfig, str, str, int]] = {
    "gpt2": (
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4),
        "transformer.h.1.attn",
        "transformer.h.1.mlp",
        4,
    ),
    "llama": (
        LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=24),
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
        7,
    ),
    "qwen3": (
        Qwen3Config(**SIZES, num_key_value_heads=2, intermediate_size=24, head_dim=8),
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
        7,
    ),
    "phi3": (
        Phi3Config(**SIZES, num_key_value_heads=2, intermediate_size=24, pad_token_id=0),
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
        4,
    ),
    "gpt_neox": (
        GPTNeoXConfig(**SIZES, intermediate_size=24),
        "gpt_neox.layers.1.attention",
        "gpt_neox.layers.1.mlp",
        4,
    ),
    "opt": (
        OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16),
        "model.decoder.layers.1.self_attn",
        "model.decoder.layers.1.fc2",
        6,
    ),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_parts(name: str) -> None:
    config, attention, feed_forward, linears = CONFIGS[name]
    family = family_from_config(config)
    layer = family.layers[1]
    assert layer.attention is not None
    assert layer.feed_forward is not None
    assert (layer.attention.path, layer.feed_forward.path) == (attention, feed_forward)
    assert layer.feed_forward.whole is (name != "opt")
    assert len(family.linears) == 2 * linears
    assert family.hidden_size == 16
    assert family.vocab_size == 50


def test_grouped_heads_and_head_size() -> None:
    attention = family_from_config(CONFIGS["qwen3"][0]).attentions[0]
    assert (attention.kv_heads, attention.key_dim) == (2, 8)


def test_a_config_alone_says_the_same_as_the_model() -> None:
    for model in (gpt2(), llama()):
        assert family_from_config(model.config) == describe(model)
    assert describe(gpt2()).position_table == 64
    assert describe(llama()).position_table is None
    assert describe(gpt2()).conv1d
