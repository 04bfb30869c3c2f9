"""Differences of losses and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: steps of a free run that count as its beginning
EARLY = 20


@dataclass(frozen=True)
class Near:
    """How near a gradient is to another: over all tensors together, those that both lack left out.

    Attributes:
        cosine: of the two.
        error: the norm of their difference over the norm of the reference.
        norm: of the reference.
    """

    cosine: float
    error: float
    norm: float


def near(gradient: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Near:
    """Raises ValueError where the tensors are others."""
    if set(gradient) != set(reference):
        raise ValueError(f"gradients of other tensors: {sorted(set(gradient) ^ set(reference))[:5]}")
    product = own = other = apart = 0.0
    for name, value in gradient.items():
        a = value.detach().double()
        b = reference[name].to(a.device).double()
        product += float((a * b).sum())
        own += float(a.square().sum())
        other += float(b.square().sum())
        apart += float((a - b).square().sum())
    norms = (own * other) ** 0.5
    error = (apart / other) ** 0.5 if other else float(apart > 0)
    return Near(product / norms if norms else 0.0, error, other**0.5)


def held_steps(losses: Sequence[float], gradients: Sequence[Near], reference: Sequence[float]) -> dict[str, Any]:
    """Of the steps at given weights."""
    return {
        "loss": max(abs(a - b) for a, b in zip(losses, reference, strict=True)),
        "first_cosine": gradients[0].cosine,
        "least_cosine": min(one.cosine for one in gradients),
        "error": max(one.error for one in gradients),
        "errors": [one.error for one in gradients],
        "pooled": _pooled(gradients),
    }


def _pooled(gradients: Sequence[Near]) -> float:
    """The error of all gradients as if they were one."""
    size = sum(one.norm**2 for one in gradients)
    return (sum((one.error * one.norm) ** 2 for one in gradients) / size) ** 0.5 if size else 0.0


def free_steps(losses: Sequence[float], valid: float, reference: Sequence[float], other: float) -> dict[str, Any]:
    """Of two free runs, step by step; `valid` is signed."""
    apart = [abs(a - b) for a, b in zip(losses, reference, strict=True)]
    return {
        "early": max(apart[:EARLY]),
        "largest": max(apart),
        "mean": sum(apart) / len(apart),
        "valid": valid - other,
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"
