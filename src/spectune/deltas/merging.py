"""Write a delta into a copy of the base, and prove that the copy answers the same."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.deltas.attaching import attached
from spectune.deltas.attachment import Attachment
from spectune.deltas.delta import Delta
from spectune.deltas.difference import Difference, measure, own_rounding, tokens_to_measure_on
from spectune.deltas.modules import ParameterModule, SideModule
from spectune.errors import ConfigError, first_line, some
from spectune.families import quantised_weights

#: float32: the largest logit difference, as a share of the largest logit; a base whose own float32 logits are further
#: than that from float64's is judged by twice its own rounding
FLOAT32_TOLERANCE = 1e-5
#: lower precision: the mean difference, as a share of the delta's mean effect on the logits
LOW_PRECISION_TOLERANCE = 0.01


def merge(
    model: PreTrainedModel, name: str, *, rows: Sequence[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None, check: bool = True
) -> PreTrainedModel:  # fmt: skip
    """A new, plain transformers model with delta `name` written into its weights; `model` is left as it is.

    Args:
        rows: what to compare on: lists of token ids, things with `input_ids` (encoded examples), or texts, which need
            `tokenizer`; the first 32 of them, 1,024 tokens each. Without rows, fixed random tokens.
        check: compare the logits of merged and unmerged, print the largest difference, and refuse where they differ
            by more than rounding (see the constants of this module). A base that was trained itself is only copied:
            there is nothing to compare.

    Raises:
        ConfigError: no such delta; the method or this base cannot merge; the merged model's answers differ; `rows`
            are of another kind.
    """
    merged, difference = merge_and_measure(model, name, rows=rows, tokenizer=tokenizer, check=check)
    if difference is not None:
        print(f"merged {name!r}: {difference}")  # noqa: T201
    return merged


def merge_and_measure(
    model: PreTrainedModel, name: str, *, rows: Sequence[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None, check: bool = True
) -> tuple[PreTrainedModel, Difference | None]:  # fmt: skip
    """`merge` for programs: prints nothing, returns what it measured too (None where nothing was compared)."""
    deltas = attached(model)
    if name not in deltas:
        raise ConfigError(f"no delta {name!r} is attached; attached are: {', '.join(deltas) or 'none'}")
    method = deltas[name].method
    if not method.can_merge:
        raise ConfigError(
            f"{method.label} cannot be merged: it does not act as a change of the base's weights. "
            "Keep it attached (its cost at inference is measured by `spectune compare`), or use LoRA or BitFit."
        )
    _refuse_quantised(model)
    compared = check and not method.trains_base
    found = tokens_to_measure_on(model, rows, tokenizer) if compared else None  # before the copy: it may refuse
    try:
        merged = copy.deepcopy(model)
    except RuntimeError as error:
        raise ConfigError(
            f"this {type(model).__name__} cannot be copied, and merging goes into a copy: {first_line(error)}. Some "
            "types keep tensors of their last forward pass: run it once under torch.no_grad(), then merge."
        ) from error
    _write(merged, attached(merged)[name])
    _take_everything_off(merged)
    if found is None:
        return merged, None
    difference = measure(model, merged, name, *found)
    if _exact(merged) and not difference.largest <= FLOAT32_TOLERANCE * difference.largest_logit:
        # a base may round its own logits by more than that (spectune-tiny does): only then is it worth the memory
        difference = replace(difference, own_rounding=own_rounding(model, name, found[0]))
    _judge(difference, merged, name)
    return merged, difference


def _write(merged: PreTrainedModel, delta: Delta) -> None:
    """Every module of the delta into the weights of the module it acts after; all that cannot be are named."""
    tied = _tied_weights(merged, delta)
    before = [(weight, weight.detach().clone()) for weight, _ in tied]
    problems: dict[str, list[str]] = defaultdict(list)
    with torch.no_grad():
        for site, module in delta.sites:
            try:
                if isinstance(module, ParameterModule):
                    parameter = merged.get_parameter(site.path)
                    parameter.data = module.changed(parameter.data)
                    continue
                assert isinstance(module, SideModule), "a method that can merge acts at modules or on parameters"
                module.merge_into(merged.get_submodule(site.path))
            except ConfigError as error:
                problems[str(error)].append(site.path)
    if problems:
        raise ConfigError("\n".join(f"{some(paths)}: {reason}" for reason, paths in problems.items()))
    for (weight, old), (_, owners) in zip(before, tied, strict=True):
        if not torch.equal(weight, old):
            raise ConfigError(
                f"{' and '.join(owners)} are one tied weight: merging {delta.name!r} into one would change the other "
                "in silence. Keep the delta attached, or load the base untied (tie_word_embeddings=False) and load "
                "the delta there."
            )


def _tied_weights(model: PreTrainedModel, delta: Delta) -> list[tuple[nn.Parameter, list[str]]]:
    """Weights at the delta's sites that other modules hold too, with the names of all that hold them."""
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owners[parameter].append(f"{path}.{leaf}")
    at_sites = {site.host for site, _ in delta.sites}
    tied = [(weight, names) for weight, names in owners.items() if len(names) > 1]
    return [(weight, names) for weight, names in tied if any(name.rpartition(".")[0] in at_sites for name in names)]


def _take_everything_off(merged: PreTrainedModel) -> None:
    """All deltas, hooks and attributes of ours: what is left is a model that knows nothing of spectune."""
    attachment = Attachment.of(merged)
    assert attachment is not None, "the copy of a model with deltas has an attachment"
    if attachment.tuned is not None:  # what trained the base is in its weights already
        attachment.deltas.clear()
        attachment.close()
    for delta in list(attachment.deltas.values()):
        attachment.remove(delta)


def _refuse_quantised(model: PreTrainedModel) -> None:
    held = quantised_weights(model)
    settings = getattr(model.config, "quantization_config", None)  # transformers takes it away with dequantize()
    if held or settings is not None:
        where = f"{some(list(held))}: {next(iter(held.values()))}" if held else f"its config has {settings}"
        raise ConfigError(
            f"merging is refused: this base is quantised ({where}), and such weights cannot take a small change. "
            "Load the base without quantisation (no base_precision), load the delta there (spectune.load_delta: its "
            "fingerprint still matches), merge, and quantise the merged model."
        )


def _exact(model: PreTrainedModel) -> bool:
    return all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())


def _judge(difference: Difference, merged: PreTrainedModel, name: str) -> None:
    """Refuse what is more than rounding. The comparisons are such that NaN is refused."""
    if _exact(merged):
        allowed = FLOAT32_TOLERANCE * difference.largest_logit
        # merged and unmerged each round in their own way
        own = difference.own_rounding
        if not (difference.largest <= allowed or (own is not None and difference.largest <= 2 * own)):
            raise ConfigError(
                f"merging {name!r} changes the answers by more than rounding ({FLOAT32_TOLERANCE:g} of the largest "
                f"logit, or twice what the base itself rounds): {difference}. The merged model is not given out."
            )
        return
    if not difference.mean <= LOW_PRECISION_TOLERANCE * difference.mean_effect:
        names = ", ".join(sorted({str(p.dtype) for p in merged.parameters()} - {"torch.float32"}))
        raise ConfigError(
            f"merging {name!r} in {names} rounds the delta away: logits move by {difference.mean:.3g} on average, the "
            f"delta's own effect is {difference.mean_effect:.3g} (at most {LOW_PRECISION_TOLERANCE:.0%} of it is "
            f"allowed), measured on {difference.measured_on}. Load the base with dtype float32 and merge there."
        )
