"""Faults planted into good exports: each is what some tool has written, or what a slip in ours would.

A fault changes a folder. It returns False where it cannot be made of this one (a scale that no config has).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Fault = Callable[[Path, Path], bool]

_PEFT = "adapter_model.safetensors"
_MODEL = "model.safetensors"


def _edit(folder: Path, file: str, change: Callable[[Tensors], Tensors]) -> bool:
    with safe_open(folder / file, "pt") as opened:
        metadata = opened.metadata()
    before = load_file(folder / file)
    after = {name: tensor.contiguous() for name, tensor in change(dict(before)).items()}
    save_file(after, folder / file, metadata=metadata)
    same = set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    return not same


def _config(folder: Path, file: str, **changed: Any) -> bool:
    """Set keys of a config; None takes a key away. False where it says the same as before."""
    config = json.loads((folder / file).read_text())
    after = {key: value for key, value in (config | changed).items() if value is not None}
    (folder / file).write_text(json.dumps(after))
    return bool(after != config)


# -- PEFT's folder -----------------------------------------------------------------------------------------------------


def wrong_prefix(folder: Path, base: Path) -> bool:
    """One level of the names is missing: PEFT finds none of them."""
    return _edit(
        folder, _PEFT, lambda ts: {name.replace("base_model.model.", "base_model."): t for name, t in ts.items()}
    )


def names_of_another_wrapping(folder: Path, base: Path) -> bool:
    """Names of a text model inside one of images, for a text model, or the other way round (vllm #48019)."""

    def change(tensors: Tensors) -> Tensors:
        inner, outer = ".language_model.", "base_model.model."
        wrapped = any(inner in name for name in tensors)
        return {
            name.replace(inner, ".") if wrapped else name.replace(outer, f"{outer}language_model."): tensor
            for name, tensor in tensors.items()
        }

    return _edit(folder, _PEFT, change)


def targets_miss_a_linear(folder: Path, base: Path) -> bool:
    """The config names all targets but one; its tensors are there, and nobody reads them."""
    targets = json.loads((folder / "adapter_config.json").read_text()).get("target_modules")
    if not isinstance(targets, list) or len(targets) < 2:
        return False
    return _config(folder, "adapter_config.json", target_modules=targets[1:])


def targets_miss_layers(folder: Path, base: Path) -> bool:
    """The config says the first layer only."""
    config = json.loads((folder / "adapter_config.json").read_text())
    known = peft.PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    if not config.get("target_modules") or "layers_to_transform" not in {entry.name for entry in fields(known)}:
        return False
    return _config(folder, "adapter_config.json", layers_to_transform=[0])


def experts_lost(folder: Path, base: Path) -> bool:
    """The config does not name the experts' parameters, whose tensors are there."""
    return _config(folder, "adapter_config.json", target_parameters=None)


def alpha_lost(folder: Path, base: Path) -> bool:
    """`lora_alpha` is PEFT's default."""
    if "lora_alpha" not in json.loads((folder / "adapter_config.json").read_text()):
        return False
    return _config(folder, "adapter_config.json", lora_alpha=None)


def rslora_toggled(folder: Path, base: Path) -> bool:
    """`alpha / r` in place of `alpha / sqrt(r)`, or the other way round."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if "lora_alpha" not in config or math.sqrt(config["r"]) == config["r"]:
        return False
    return _config(folder, "adapter_config.json", use_rslora=not config.get("use_rslora"))


def magnitudes_lost(folder: Path, base: Path) -> bool:
    """DoRA's folder as plain LoRA."""
    if not json.loads((folder / "adapter_config.json").read_text()).get("use_dora"):
        return False
    return _config(folder, "adapter_config.json", use_dora=False)


def zeros(folder: Path, base: Path) -> bool:
    """The weights of LoRA's B as they started; of the other methods all."""

    def change(tensors: Tensors) -> Tensors:
        lora = any("lora_B" in name for name in tensors)
        return {name: tensor * 0 if not lora or "lora_B" in name else tensor for name, tensor in tensors.items()}

    return _edit(folder, _PEFT, change)


def a_layer_is_missing(folder: Path, base: Path) -> bool:
    """The tensors of one module are not there."""

    def change(tensors: Tensors) -> Tensors:
        first = sorted(tensors)[0].partition(".lora_")[0]
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{first}.lora_")}

    return _edit(folder, _PEFT, change)


def virtual_tokens_out_of_order(folder: Path, base: Path) -> bool:
    """The virtual tokens of a prompt, the last one first. (Those of a prefix have no order.)"""
    if json.loads((folder / "adapter_config.json").read_text())["peft_type"] != "PROMPT_TUNING":
        return False
    return _edit(folder, _PEFT, lambda ts: {name: tensor.flip(0) for name, tensor in ts.items()})


def keys_for_values(folder: Path, base: Path) -> bool:
    """Of a prefix `[tokens, layers * (key, value) * width]`, keys and values exchanged."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if config["peft_type"] != "PREFIX_TUNING":
        return False

    def change(tensors: Tensors) -> Tensors:
        [(name, tensor)] = tensors.items()
        parts = tensor.reshape(tensor.shape[0], config["num_layers"], 2, -1)
        return {name: parts.flip(2).reshape(tensor.shape)}

    return _edit(folder, _PEFT, change)


# -- a merged model ----------------------------------------------------------------------------------------------------


def nothing_merged(folder: Path, base: Path) -> bool:
    """The base."""
    return _edit(folder, _MODEL, lambda ts: load_file(base / _MODEL))


def _rounded(folder: Path, levels: int) -> bool:
    def change(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if tensor.dim() == 2 and "norm" not in name:
                step = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-9) / levels
                tensors[name] = (tensor / step).round() * step
        return tensors

    return _edit(folder, _MODEL, change)


def merged_in_4_bits(folder: Path, base: Path) -> bool:
    """Each row of a weight has 15 values."""
    return _rounded(folder, 7)


def merged_in_8_bits(folder: Path, base: Path) -> bool:
    """Each row of a weight has 255 values."""
    return _rounded(folder, 127)


def through_bfloat16(folder: Path, base: Path) -> bool:
    """Rounded to bfloat16, and stored as float32."""
    return _edit(folder, _MODEL, lambda ts: {name: tensor.bfloat16().float() for name, tensor in ts.items()})


def _other_change(folder: Path, base: Path, other: Callable[[Tensor], Tensor]) -> bool:
    """Each weight `W + change` of the folder becomes `W + other(change)`."""
    bare = load_file(base / _MODEL)

    def change(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if name in bare and bare[name].shape == tensor.shape and tensor.dim() == 2:
                tensors[name] = bare[name] + other(tensor - bare[name])
        return tensors

    return _edit(folder, _MODEL, change)


def merged_twice(folder: Path, base: Path) -> bool:
    """The change is added two times."""
    return _other_change(folder, base, lambda change: 2 * change)


def changes_transposed(folder: Path, base: Path) -> bool:
    """The change of each square weight is transposed, as where Conv1D is taken for a linear."""
    return _other_change(folder, base, lambda c: c.T if c.shape[0] == c.shape[1] else c)


def a_weight_is_left_out(folder: Path, base: Path) -> bool:
    """One weight of a layer is the base's."""
    bare = load_file(base / _MODEL)

    def change(tensors: Tensors) -> Tensors:
        moved = [
            n for n in sorted(tensors) if n in bare and not torch.equal(tensors[n], bare[n]) and tensors[n].dim() == 2
        ]
        return tensors | ({moved[0]: bare[moved[0]]} if moved else {})

    return _edit(folder, _MODEL, change)


def tying_turned(folder: Path, base: Path) -> bool:
    """`tie_word_embeddings` is turned: a head that was tied is drawn at random, one of its own is the embedding."""
    config = json.loads((folder / "config.json").read_text())
    if not isinstance(config.get("tie_word_embeddings"), bool):
        return False
    heads = ("lm_head.weight", "embed_out.weight")
    _edit(folder, _MODEL, lambda ts: {name: tensor for name, tensor in ts.items() if name not in heads})
    return _config(folder, "config.json", tie_word_embeddings=not config["tie_word_embeddings"])


# -- prompt embeddings -------------------------------------------------------------------------------------------------


def a_virtual_token_is_missing(folder: Path, base: Path) -> bool:
    """One token less."""
    return _edit(folder, "prompt_embeds.safetensors", lambda ts: {name: t[1:] for name, t in ts.items()})


def embeddings_out_of_order(folder: Path, base: Path) -> bool:
    """The last one first."""
    return _edit(folder, "prompt_embeds.safetensors", lambda ts: {name: t.flip(0) for name, t in ts.items()})


def embeddings_of_zeros(folder: Path, base: Path) -> bool:
    """All zeros."""
    return _edit(folder, "prompt_embeds.safetensors", lambda ts: {name: t * 0 for name, t in ts.items()})


FAULTS: dict[str, tuple[Fault, ...]] = {
    "peft": (
        wrong_prefix, names_of_another_wrapping, targets_miss_a_linear, targets_miss_layers, experts_lost, alpha_lost,
        rslora_toggled, magnitudes_lost, zeros, a_layer_is_missing, virtual_tokens_out_of_order, keys_for_values,
    ),
    "merged": (
        nothing_merged, merged_in_4_bits, merged_in_8_bits, through_bfloat16, merged_twice, changes_transposed,
        a_weight_is_left_out, tying_turned,
    ),
    "prompt-embeds": (a_virtual_token_is_missing, embeddings_out_of_order, embeddings_of_zeros),
}  # fmt: skip
