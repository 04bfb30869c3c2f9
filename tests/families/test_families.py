"""Parts are found by structure, on models of unlike make, from weights and from configs alone."""

from __future__ import annotations

import pytest
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LongcatFlashConfig,
    MambaConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)

from spectune.errors import ConfigError
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


def test_an_encoder_decoder_is_refused_and_its_decoder_alone_is_not() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 50,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip
    with pytest.raises(ConfigError, match="is an encoder-decoder"):
        describe(BartForConditionalGeneration(BartConfig(**sizes)))
    family = describe(BartForCausalLM(BartConfig(**sizes)))
    assert [layer.path for layer in family.layers] == ["model.decoder.layers.0", "model.decoder.layers.1"]
    assert not any("encoder_attn" in path for path in (t.path for t in family.linears))
    assert not any("encoder_attn" in bias.path for bias in family.biases)


def test_latent_attention_says_the_sizes_of_its_keys_and_values() -> None:
    config = DeepseekV3Config(
        **SIZES, num_key_value_heads=4, intermediate_size=24, moe_intermediate_size=8, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4,
        v_head_dim=5,
    )  # fmt: skip
    attention = family_from_config(config).attentions[0]
    assert (attention.kv_heads, attention.key_dim, attention.value_dim) == (4, 10, 5)
    assert attention.keys is None


def test_what_stands_beside_the_text_is_left_out() -> None:
    """A tower for pictures is deeper and heavier than the text's layers here."""
    text = Gemma3TextConfig(**SIZES, head_dim=4, num_key_value_heads=2, intermediate_size=24)
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    family = describe(Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)))
    assert family.decoder == "model.language_model"
    assert all(layer.path.startswith("model.language_model.layers.") for layer in family.layers)
    assert not family.biases


def test_state_space_layers_have_no_attention_and_their_biases_are_changed_in_place() -> None:
    family = family_from_config(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4))
    assert not family.attentions
    assert {(bias.name, bias.additive) for bias in family.biases if "conv1d" in bias.path} == {("bias", False)}


def test_layers_may_stand_in_several_lists_and_hold_two_attentions() -> None:
    config = LongcatFlashConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_attention_heads=4, ffn_hidden_size=24, q_lora_rank=8,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, moe_topk=2, n_routed_experts=4,
        zero_expert_num=1, expert_ffn_hidden_size=8,
    )  # fmt: skip
    family = family_from_config(config)
    assert [len(layer.attentions) for layer in family.layers] == [2, 2]
