"""Padding on the right of a batch's rows, and whether a model has to be told of it.

A causal model's real tokens stand before all padding and see none of it: without an attention mask they come out the
same, at the same positions, and what the padding gives is scored by nobody. Attention then takes its causal kernels.
Whether a model is causal throughout is proved by running it, not known by its type.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from spectune.compute.evaluating import evaluating
from spectune.deltas.attachment import Attachment
from spectune.deltas.probes.agreement import agree, apart, logits_of
from spectune.deltas.probes.base_runs import proved_as_routed
from spectune.errors import ConfigError, first_line
from spectune.families import Family, token_embedding

#: tokens of the padded rows of the probe, and of its longest row
_TEXT, _LENGTH = 5, 9


def why_mask_is_needed(model: PreTrainedModel) -> str | None:
    """Why the model, as it is routed now, needs the attention mask of rows that are padded on the right; None where its
    real tokens come out the same without.

    One text is run beside a longer row, with its padding masked and with two different paddings that are not: its
    logits have to agree. So types that look ahead, or that number positions by what they take for padding, are found
    out whatever they are called. Where a layer has experts the mask stays: how many tokens each expert takes, and what
    is said of their balance, may depend on it. Raises ConfigError: nothing is attached."""
    attachment = Attachment.of(model)
    if attachment is None:
        raise ConfigError("whether padding needs a mask is asked of a model with an attached delta")
    if _has_experts(model, attachment.family):
        return "its layers have experts, which may count the padding"
    if attachment.family.trained_head:
        return "its head finds the end of a text by the padding"
    proved, key = proved_as_routed(model, "needs no mask")
    if key not in proved and (reason := _why_mask_is_needed(model)) is not None:
        return reason
    proved[key] = True
    return None


def _why_mask_is_needed(model: PreTrainedModel) -> str | None:
    embedding = token_embedding(model).weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, embedding.shape[0], (4, _LENGTH), generator=generator)
    ids[2, :_TEXT] = ids[1, :_TEXT]  # the same text before another padding
    ids[3, _TEXT - 1 :] = ids[1, _TEXT - 1 :]  # its last token after another text
    mask = torch.ones_like(ids)
    mask[1:, _TEXT:] = 0
    ids, mask = ids.to(embedding.device), mask.to(embedding.device)
    try:
        with evaluating(model):
            masked = logits_of(model, ids, mask)[:, :_TEXT]
            unmasked = logits_of(model, ids)[:, :_TEXT]
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    size = float(masked.abs().max())
    off = apart([(masked[1:], unmasked[1:]), (unmasked[1], unmasked[2])])
    effect = apart([(unmasked[1, -1], unmasked[3, -1])])
    if agree(model, off, size, effect):
        return None
    return (
        f"real tokens' logits change by {off / size:.2g} of the largest where padding after them is not masked "
        f"(another text before them makes {effect / size:.2g})"
    )


def _has_experts(model: PreTrainedModel, family: Family) -> bool:
    """Whether a layer holds a list of modules, or one weight of three dimensions that is no convolution's."""
    for layer in family.layers:
        for name, module in model.get_submodule(layer.path).named_modules():
            if ".deltas." in f".{name}" or isinstance(module, nn.modules.conv._ConvNd):
                continue
            if isinstance(module, nn.ModuleList) and len(module) > 1:
                return True
            if any(weight.dim() == 3 for weight in module.parameters(recurse=False)):
                return True
    return False
