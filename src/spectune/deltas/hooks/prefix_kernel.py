"""One prefix before all rows of a batch in which nothing is hidden: attention without a mask, causal or not.

SDPA's causal flag is aligned to the top left, and the kernels behind it (flash attention, cuDNN) are taken for as many
queries as keys; a prefix of p tokens before T of text makes T queries over p + T keys. So p queries of zeros are put in
front of the text's, and what they give is cut off again: at the places that are left, each query sees the prefix and
the text up to itself. No gradient comes from the places that were cut off, so keys and values get what is theirs. It
costs (p + T) / T of plain causal attention, where a dense mask cost three times as much (docs/performance.md).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: arguments of attention functions that speak of single queries and keys, or that no kernel knows
BEYOND_KERNELS = ("softcap", "s_aux", "position_bias", "head_mask")


def fits(module: nn.Module, query: Tensor, key: Tensor, slides: bool, settings: dict[str, Any]) -> bool:
    """Whether attention that came without a mask is all that a prefix in front of its keys needs.

    Args:
        query: `[batch, heads, queries, dim]`; key: `[batch, kv_heads, keys, dim]`, without the prefix.
        slides: a sliding window moves past the prefix; else it is seen from everywhere.
        settings: what the attention function was called with besides.
    """
    if any(settings.get(name) is not None for name in BEYOND_KERNELS):
        return False
    if slides and settings.get("sliding_window") is not None:
        return False
    return query.shape[2] == key.shape[2] or not attends_causally(module, query, settings)


def attends_causally(module: nn.Module, query: Tensor, settings: dict[str, Any]) -> bool:
    """Whether transformers' function for SDPA hides later keys where no mask comes; a new token alone sees all there
    is."""
    given = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if given is None else given
    return bool(causal) and query.shape[2] > 1


def attend(
    function: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    prefix: tuple[Tensor, Tensor], settings: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention over the prefix and the text, where it `fits`.

    Args:
        function: transformers' attention function for SDPA, which sets the causal flag where no mask comes.
        query, key, value: `[batch, heads or kv_heads, length, dim]`, of the text.
        prefix: keys and values, `[kv_heads, virtual tokens, dim]`, of any dtype.

    Returns:
        what `function` does: `[batch, queries, heads, dim]`, and no weights.
    """
    batch, count = key.shape[0], prefix[0].shape[1]
    key, value = (
        torch.cat([lead.to(own.dtype).expand(batch, -1, -1, -1), own], dim=2)
        for lead, own in zip(prefix, (key, value), strict=True)
    )
    if not attends_causally(module, query, settings):
        alone: tuple[Tensor, Tensor | None] = function(module, query, key, value, None, **settings)
        return alone
    found, weights = function(module, F.pad(query, (0, 0, count, 0)), key, value, None, **settings)
    return found[:, count:], weights
