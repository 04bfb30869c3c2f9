"""Write a delta into a copy of the base, and prove that the copy answers the same."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectune.deltas.attach import attached
from spectune.deltas.modules import OutputModule
from spectune.deltas.probe import evaluating
from spectune.deltas.registry import Registry
from spectune.deltas.routing import route
from spectune.errors import ConfigError
from spectune.families import token_embedding

log = logging.getLogger("spectune")

#: float32: the largest logit difference, as a share of the largest logit
FLOAT32_TOLERANCE = 1e-5
#: lower precision: the mean difference, as a share of the delta's mean effect on the logits
LOW_PRECISION_TOLERANCE = 0.01


def merge(model: PreTrainedModel, name: str, *, check: bool = True) -> PreTrainedModel:
    """A new, plain transformers model with delta `name` written into its weights; `model` is left as it is.

    Args:
        check: compare logits of merged and unmerged on fixed tokens, log the largest difference, and refuse where
            they differ by more than rounding (see the constants of this module).

    Raises:
        ConfigError: no such delta; the method or this base cannot merge; the merged model's answers differ.
    """
    deltas = attached(model)
    if name not in deltas:
        raise ConfigError(f"no delta {name!r} is attached; attached are: {', '.join(deltas) or 'none'}")
    method = deltas[name].method
    if not method.can_merge:
        raise ConfigError(
            f"{method.label} cannot be merged: it does not act as a change of the base's weights. "
            "Keep it attached (its cost at inference is measured by `spectune compare`), or use LoRA or BitFit."
        )
    merged = copy.deepcopy(model)
    delta = attached(merged)[name]
    with torch.no_grad():
        for site, module in delta.sites:
            if isinstance(module, OutputModule):
                module.merge_into(merged.get_submodule(site.path))
    registry = Registry.of(merged)
    assert registry is not None, "the copy of a model with deltas has a registry"
    for other in registry.deltas.values():
        if not other.method.trains_base:  # what trained the base is in its weights already
            other.close(registry)
    registry.deltas.clear()
    registry.close()
    if check and not method.trains_base:
        _compare(model, merged, name)
    return merged


def _compare(model: PreTrainedModel, merged: PreTrainedModel, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, token_embedding(model).num_embeddings, (4, 16), generator=generator)
    with evaluating(model), evaluating(merged):
        with route(model, name):
            unmerged = _logits(model, ids)
        with route(model, None):
            bare = _logits(model, ids)
        difference = (_logits(merged, ids) - unmerged).abs()
    largest, scale = float(difference.max()), float(unmerged.abs().max())
    log.info("merged %r: largest logit difference %.3g, largest logit %.3g", name, largest, scale)
    if model.dtype == torch.float32:
        if largest > FLOAT32_TOLERANCE * scale:
            raise ConfigError(
                f"merging {name!r} changes logits by {largest:.3g} where the largest logit is {scale:.3g}: more than "
                f"rounding ({FLOAT32_TOLERANCE:g} of it). The merged model is not given out."
            )
        return
    effect = float((unmerged - bare).abs().mean())
    mean = float(difference.mean())
    if mean > LOW_PRECISION_TOLERANCE * effect:
        raise ConfigError(
            f"merging {name!r} in {model.dtype} rounds the delta away: logits move by {mean:.3g} on average, "
            f"the delta's own effect is {effect:.3g} (at most {LOW_PRECISION_TOLERANCE:.0%} of it is allowed). "
            "Load the base with dtype float32 and merge there."
        )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    ids = ids.to(token_embedding(model).weight.device)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.float()
