"""Tiny mixtures of experts of unlike kinds, random weights, float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.contract.families import SIZES

SMALL = {**SIZES, "num_hidden_layers": 2}


def mixtral() -> PreTrainedModel:
    """`[experts, out, in]`, and a router that is a parameter too."""
    return _filled(MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)))


def gpt_oss() -> PreTrainedModel:
    """`[experts, in, out]`, with a row of biases for each expert."""
    return _filled(
        GptOssForCausalLM(
            GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=6)
        )
    )


def qwen3_next() -> PreTrainedModel:
    """Experts beside a shared one, whose linears are called what experts' were; linear attention in one layer."""
    heads = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    kinds = {"layer_types": ["linear_attention", "full_attention"]}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
               "shared_expert_intermediate_size": 16}  # fmt: skip
    return _filled(Qwen3NextForCausalLM(Qwen3NextConfig(**SMALL, **heads, **experts, **kinds, head_dim=8)))


def _filled(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {make.__name__: make for make in (mixtral, gpt_oss, qwen3_next)}
