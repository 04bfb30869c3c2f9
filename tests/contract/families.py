"""Tiny models of eight families, random weights, float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 97
CONTEXT = 64

TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
}


def gpt2(layers: int = 3) -> PreTrainedModel:
    """Learned absolute positions, `Conv1D`, fused q/k/v, biases, tied embeddings."""
    sizes = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": CONTEXT}
    return GPT2LMHeadModel(GPT2Config(**TOKENS, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def llama(layers: int = 3) -> PreTrainedModel:
    """Rotary positions, grouped-query attention, gated feed-forward, no bias anywhere."""
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": layers}))


def qwen3() -> PreTrainedModel:
    """Norms on queries and keys, a head size of its own."""
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))


def gemma3() -> PreTrainedModel:
    """Two layers with a sliding window of 6 tokens and one without, two norms around each sublayer."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6, layer_types=kinds))


def phi3() -> PreTrainedModel:
    """Fused q/k/v and fused gate and up projections."""
    return Phi3ForCausalLM(Phi3Config(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0))


def opt() -> PreTrainedModel:
    """Positions counted from the mask, with two rows of the table to spare; a feed-forward without a module of its
    own; biases."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return OPTForCausalLM(
        OPTConfig(**TOKENS, **sizes, ffn_dim=48, max_position_embeddings=CONTEXT, dropout=0.0, attention_dropout=0.0)
    )


def gpt_neox() -> PreTrainedModel:
    """Attention and feed-forward in parallel, q/k/v fused head by head, biases."""
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0))


def mixtral(layers: int = 3) -> PreTrainedModel:
    """A mixture of four experts, two for each token; experts are 3-D parameters."""
    sizes = SIZES | {"num_hidden_layers": layers}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    make.__name__: make for make in (gpt2, llama, qwen3, gemma3, phi3, opt, gpt_neox, mixtral)
}
