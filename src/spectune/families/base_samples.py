"""What folders of format 1 have of their base: hashed names and shapes, and samples of two weights."""

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


def sample_differences(stored: dict[str, Any], model: PreTrainedModel, family: Family) -> list[str]:
    """The differences between a base as format 1 recorded it and this one, one line each. It sees other shapes, and
    other token embeddings or another last norm; nothing of the linears."""
    here = _samples(model, family)
    if stored["parts_sha256"] != here["parts_sha256"]:
        return [
            f"the base's parts differ: it was trained on a {stored['model_type']} base with other names or shapes, "
            f"this is a {family.model_type} base"
        ]
    found = []
    for name, values in stored["samples"].items():
        others = here["samples"].get(name, [])
        scale = max((abs(v) for v in values), default=0.0)
        apart = [abs(a - b) > TOLERANCE * max(abs(a), 0.1 * scale) for a, b in zip(values, others, strict=False)]
        if len(values) != len(others) or sum(apart) > len(apart) // 8:
            found.append(f"the weights of {name} are another base's ({sum(apart)} of {len(values)} samples differ)")
    return found


def _samples(model: PreTrainedModel, family: Family) -> dict[str, Any]:
    norms = [(name, module) for name, module in model.named_modules() if is_norm(module) and ".deltas." not in name]
    parts = [f"{linear.path} {linear.in_features} {linear.out_features}" for linear in family.linears]
    parts += [f"{name} {module.weight.numel()}" for name, module in norms]
    parts += [f"{family.embedding} {family.vocab_size} {family.hidden_size}"]
    samples = {family.embedding: _sample(model.get_submodule(family.embedding))}
    if norms:
        samples[norms[-1][0]] = _sample(norms[-1][1])
    return {"parts_sha256": hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest(), "samples": samples}


def _sample(module: nn.Module) -> list[float]:
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or weight.device.type == "meta":
        return []
    flat = weight.detach().flatten()
    picks = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long().to(flat.device)
    return [round(float(value), 6) for value in flat[picks].float().cpu()]
