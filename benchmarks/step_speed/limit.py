"""The physical limit: floating-point operations that a step cannot do without, and how fast a device does them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D


def block_weights(config: PretrainedConfig) -> tuple[int, int]:
    """Weights of the matrices of all blocks (N_l), and of the head (N_h = vocabulary x hidden size)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    head = model.get_output_embeddings()
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    return sum(m.weight.numel() for m in matrices), head.weight.numel()


def flops_per_token(config: PretrainedConfig, length: int, trained: int, *, trains_base: bool) -> float:
    """Operations a token, forward and backward, each made once: recomputation is no work.

    A frozen base 4 (N_l + N_h) + 6 T q L + 6 P, one that is trained 6 (N_l + N_h) + 6 T q L: q is heads x head size, L
    the layers, T the row's length, P the delta's weights. Causal attention, every position through the head; virtual
    tokens are not counted.
    """
    blocks, head = block_weights(config)
    heads = config.num_attention_heads
    query = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 6 * length * query * config.num_hidden_layers
    return (6 if trains_base else 4) * (blocks + head) + attention + (0 if trains_base else 6 * trained)


def limit(config: PretrainedConfig, length: int, trained: int, *, trains_base: bool, peak_tflops: float) -> float:
    """Tokens/s at `peak_tflops` (10^12 operations a second) of bf16 matrix products."""
    return peak_tflops * 1e12 / flops_per_token(config, length, trained, trains_base=trains_base)
