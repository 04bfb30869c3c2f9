"""A fingerprint of a base: enough to refuse another base, loose enough that the same one in bfloat16 still matches."""

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectune.families.family import Family
from spectune.families.module_kinds import is_norm

#: bfloat16 keeps 8 bits: a rounded weight is within 2^-8 of the original
TOLERANCE = 2.0**-7
SAMPLES = 32


def fingerprint(model: PreTrainedModel, family: Family) -> dict[str, Any]:
    """Names and shapes of the parts, hashed, and rounded samples of token embeddings and the last norm.

    Shapes are those of the linear maps, not of their storage: a quantised base packs its weights otherwise."""
    heads = {part.path for part in family.trained_head}  # no part of the base
    norms = [
        (name, module)
        for name, module in model.named_modules()
        if is_norm(module) and ".deltas." not in name and name not in heads
    ]
    parts = [f"{linear.path} {linear.in_features} {linear.out_features}" for linear in family.linears]
    parts += [f"{name} {module.weight.numel()}" for name, module in norms]
    parts += [f"{family.embedding} {family.vocab_size} {family.hidden_size}"]
    samples = {family.embedding: _sample(model.get_submodule(family.embedding))}
    if norms:
        samples[norms[-1][0]] = _sample(norms[-1][1])
    return {
        "model_type": family.model_type,
        "parts_sha256": hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest(),
        "samples": samples,
    }


def differences(stored: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The differences between two bases' fingerprints, one line each; empty for the same base."""
    if stored["parts_sha256"] != here["parts_sha256"]:
        return [
            f"the base's parts differ: it was trained on a {stored['model_type']} base with other names or shapes, "
            f"this is a {here['model_type']} base"
        ]
    found = []
    for name, values in stored["samples"].items():
        others = here["samples"].get(name, [])
        scale = max((abs(v) for v in values), default=0.0)
        apart = [abs(a - b) > TOLERANCE * max(abs(a), 0.1 * scale) for a, b in zip(values, others, strict=False)]
        if len(values) != len(others) or sum(apart) > len(apart) // 8:
            found.append(f"the weights of {name} are another base's ({sum(apart)} of {len(values)} samples differ)")
    return found


def _sample(module: nn.Module) -> list[float]:
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or weight.device.type == "meta":
        return []
    flat = weight.detach().flatten()
    picks = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long().to(flat.device)
    return [round(float(value), 6) for value in flat[picks].float().cpu()]
