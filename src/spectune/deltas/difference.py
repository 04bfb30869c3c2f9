"""How far a merged model's logits are from those of the delta it was merged from."""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.compute.evaluating import evaluating
from spectune.deltas.modules import DeltaModule
from spectune.deltas.routing import route
from spectune.errors import ConfigError, first_line
from spectune.families import token_embedding

log = logging.getLogger("spectune")
#: rows measured at most: three forward passes each
ROWS = 32
#: tokens of a row measured at most: logits are `[tokens, vocabulary]`
TOKENS = 1024


@dataclass(frozen=True)
class Difference:
    """Merged against unmerged, over all logits measured. Logits are absolute values, in the base's dtype."""

    largest: float
    largest_logit: float
    mean: float
    #: how far the delta moves the bare base's logits, on average
    mean_effect: float
    #: what was measured on, in words
    measured_on: str
    #: how far the unmerged logits in float32 are from those in float64, at most; None where nobody looked
    own_rounding: float | None = None

    def __str__(self) -> str:
        text = (
            f"largest logit difference {self.largest:.3g} (largest logit {self.largest_logit:.3g}), "
            f"measured on {self.measured_on}"
        )
        if self.own_rounding is None:
            return text
        return f"{text}; in float32 the unmerged logits themselves are off by up to {self.own_rounding:.3g}"


def measure(
    model: PreTrainedModel, merged: PreTrainedModel, name: str, rows: Sequence[Tensor], measured_on: str
) -> Difference:
    """Compare delta `name` on `model` with `merged`, row by row, without padding. `rows`: token ids `[tokens]` each. A
    row longer than the base's context is cut to it."""
    largest = largest_logit = summed = effect = torch.zeros((), dtype=torch.float64)
    count = 0
    with evaluating(model), evaluating(merged):
        for ids in rows:
            with route(model, name):
                unmerged = _logits(model, ids)
            with route(model, None):
                bare = _logits(model, ids)
            apart = (_logits(merged, ids) - unmerged).abs()
            # torch's maximum hands a NaN on, where Python's max would lose it
            largest = torch.maximum(largest, apart.max().double().cpu())
            largest_logit = torch.maximum(largest_logit, unmerged.abs().max().double().cpu())
            summed = summed + apart.double().sum().cpu()
            effect = effect + (unmerged - bare).abs().double().sum().cpu()
            count += apart.numel()
    return Difference(float(largest), float(largest_logit), float(summed) / count, float(effect) / count, measured_on)


def own_rounding(model: PreTrainedModel, name: str, rows: Sequence[Tensor]) -> float | None:
    """The largest difference between the logits of delta `name` in the base's own precision and in float64: what the
    base's arithmetic rounds, merged or not. Not a number where the device has no float64 (mps), None where the base
    does not run in it (kernels without float64)."""
    if any(parameter.device.type == "mps" for parameter in model.parameters()):
        return math.nan
    try:
        with evaluating(model), route(model, name):
            own = [_logits(model, ids) for ids in rows]
            with _in_float64(model):
                exact = (_logits(model, ids) for ids in rows)
                return max(float((a - b).abs().max()) for a, b in zip(exact, own, strict=True))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except RuntimeError as error:
        log.info("%s is not judged by its own rounding: it does not run in float64 (%s)", name, first_line(error))
        return None


@contextlib.contextmanager
def _in_float64(model: PreTrainedModel) -> Iterator[None]:
    """The base's weights in float64; afterwards the very same tensors are back. Delta modules follow their input.
    Experts go one by one meanwhile: products over all of them have no such kernel."""
    modules = [module for module in model.modules() if not isinstance(module, DeltaModule)]
    weights = {p: p.data for module in modules for p in module.parameters(recurse=False)}
    buffers = [(module, name, buffer) for module in modules for name, buffer in module.named_buffers(recurse=False)]
    configs = {id(c): c for m in modules if hasattr(c := getattr(m, "config", None), "_experts_implementation")}
    chosen = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in chosen:
            config._experts_implementation = "eager"
        for parameter, tensor in weights.items():
            parameter.data = tensor.double()
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.double() if buffer.is_floating_point() else buffer
        yield
    finally:
        for config, implementation in chosen:
            config._experts_implementation = implementation
        for parameter, tensor in weights.items():
            parameter.data = tensor
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def tokens_to_measure_on(
    model: PreTrainedModel, rows: Sequence[Any] | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[Tensor], str]:
    """Token ids `[tokens]` of some rows, and where they come from, in words. `rows`: what `merge` takes; None: four
    rows of 16 random tokens, the same ones each time. Raises ConfigError: rows of another kind, texts without a
    tokenizer, no rows, ids that the base does not have."""
    vocabulary = token_embedding(model).num_embeddings
    if rows is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (4, 16), generator=generator)
        return list(ids), "fixed random tokens; rows= takes real ones"
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    found = [_ids(row, tokenizer)[: min(TOKENS, int(context))] for row in list(rows)[:ROWS]]
    found = [ids for ids in found if ids]
    if not found:
        raise ConfigError("rows holds no token to measure on; give some, or rows=None for fixed random tokens")
    highest = max(max(ids) for ids in found)
    if highest >= vocabulary or min(min(ids) for ids in found) < 0:
        raise ConfigError(f"rows has token {highest}, this base has {vocabulary}: encode them with its own tokenizer")
    count = f"{len(found)}" if len(rows) <= ROWS else f"{len(found)} of {len(rows):,}"
    what = "real row" if len(rows) == 1 else "real rows"
    return [torch.tensor(ids) for ids in found], f"{count} {what} ({sum(map(len, found)):,} tokens)"


def _ids(row: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if isinstance(row, str):
        if tokenizer is None:
            raise ConfigError("rows are texts: give their tokenizer too, merge(..., rows=texts, tokenizer=tokenizer)")
        return [int(token) for token in tokenizer(row)["input_ids"]]
    ids = row.get("input_ids") if isinstance(row, Mapping) else getattr(row, "input_ids", row)
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    if not isinstance(ids, Sequence) or not all(isinstance(token, int) for token in ids):
        raise ConfigError(
            f"a row to measure on is {type(row).__name__} {str(row)[:60]!r}; expected a list of token ids, something "
            "with input_ids (such as spectune.data.encode(...).examples), or a text together with tokenizer="
        )
    return list(ids)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """`[tokens, vocabulary]`, float32 or float64."""
    ids = ids.to(token_embedding(model).weight.device)[None]
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0] if logits.dtype == torch.float64 else logits[0].float()
