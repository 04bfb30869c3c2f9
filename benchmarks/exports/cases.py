"""Good exports: a tiny base of a type with random weights, a method's delta with random weights, and a format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.coverage.bases import make, tokens
from torch import Tensor
from transformers import PreTrainedModel

from spectune.deltas import Delta, Method, attach, merge_and_measure
from spectune.methods import (
    BY_NAME,
    IA3,
    BitFit,
    DoRA,
    FullFineTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    method_from_name,
)
from spectune.storage import (
    ExpectedAnswers,
    expected_answers,
    export_formats,
    write_gguf_lora,
    write_peft,
    write_prompt_embeds,
)

#: types of unlike make: fused and separate projections, Conv1D, parallel blocks, tied heads, experts, sliding windows,
#: biases everywhere and nowhere, state spaces, and (gemma3, llava-like) text models inside models of images
TYPES = (
    "bloom", "cohere", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gptj", "granite", "llama", "mistral", "mixtral", "mpt", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "smollm3", "stablelm", "starcoder2", "xglm",
)  # fmt: skip
METHODS: dict[str, Method] = {
    "lora": LoRA(r=4, lora_alpha=12),
    "rslora": LoRA(r=4, lora_alpha=12, use_rslora=True),
    "dora": DoRA(r=4, lora_alpha=12),
    "ia3": IA3(),
    "bitfit": BitFit(),
    "prefix": PrefixTuning(num_virtual_tokens=4),
    "prompt": PromptTuning(num_virtual_tokens=4),
    "full": FullFineTuning(),
}


def _small(kind: type[Method]) -> Method:
    """A rank that tiny bases have room for."""
    rank = kind.model_fields.get("r")
    return method_from_name(str(kind.model_fields["name"].default), **({"r": 4} if rank and rank.default > 4 else {}))


METHODS |= {name: _small(kind) for name, kind in BY_NAME.items() if name not in METHODS}


def batches() -> list[dict[str, Tensor]]:
    """Three rows of unlike length, all but the first three tokens of each learned."""
    found = []
    for seed, length in enumerate((12, 7, 9)):
        ids = tokens(1, length, seed=seed)
        labels = ids.clone()
        labels[:, :3] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def save_base(model_type: str, folder: Path) -> type[PreTrainedModel]:
    """The type's base in a folder, as a user has it. Returns its class."""
    model = make(model_type)
    model.save_pretrained(folder)
    return type(model)


def attached(kind: type[PreTrainedModel], base: Path, method: Method, size: float = 0.05) -> Delta:
    """The method on the base as the folder has it, its weights moved from their start."""
    load: Any = kind.from_pretrained
    delta = attach(load(base).eval(), method, "run", keep_base=method.trains_base)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return delta


def write(delta: Delta, format_: str, folder: Path) -> ExpectedAnswers:
    """Export the delta; what its export has to answer."""
    expected = expected_answers(delta, batches())
    if format_ == "merged":
        merged, _ = merge_and_measure(delta.model, delta.name, rows=[batch["input_ids"][0] for batch in batches()])
        merged.save_pretrained(folder)
    else:
        {"peft": write_peft, "prompt-embeds": write_prompt_embeds, "gguf-lora": write_gguf_lora}[format_](delta, folder)
    return expected


def formats(delta: Delta) -> Iterator[str]:
    """Those that the delta has and that are run: llama.cpp's file is only read back."""
    yield from (name for name in export_formats(delta) if name != "gguf-lora")
