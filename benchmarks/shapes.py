"""The models that benchmarks measure, as configs: weights are random, made on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
)

from spectune.embedded import MODEL_FOLDER

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "GPT-2 124M": GPT2Config,
    "Llama 1B": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "Llama-3-8B": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    ),
    "Qwen3 4B": lambda: Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "OPT 1.3B": lambda: OPTConfig(
        vocab_size=50272, hidden_size=2048, word_embed_proj_dim=2048, ffn_dim=8192, num_hidden_layers=24,
        num_attention_heads=32, max_position_embeddings=2048,
    ),
    "Gemma-3 1B": lambda: Gemma3TextConfig(
        vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512, max_position_embeddings=8192,
    ),
    "spectune-tiny": lambda: AutoConfig.from_pretrained(MODEL_FOLDER),
    # for checks of the benchmarks themselves
    "tiny gpt2": lambda: GPT2Config(vocab_size=512, n_embd=64, n_layer=6, n_head=4, n_positions=128),
    "tiny llama": lambda: LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    ),
}  # fmt: skip


def build(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random weights, made on the device."""
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return model
