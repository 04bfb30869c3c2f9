"""Attention over a packed batch: each document sees itself and what stands before it, a prefix before each of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from spectune.compute.pack_layout import Pack
from spectune.compute.varlen import flash_by_document, flash_takes
from spectune.deltas.hooks.prefix_kernel import BEYOND_KERNELS


def mask_of(make: Callable[..., Tensor | None], pack: Pack, settings: dict[str, Any]) -> Tensor | None:
    """Transformers' own mask, as it is for each document alone. `settings`: of transformers' mask function."""
    function = settings.get("mask_function", causal_mask_function)
    settings = {**settings, "mask_function": pack.within(function), "attention_mask": None}
    return make(**{**settings, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def is_plain(settings: dict[str, Any]) -> bool:
    """Whether transformers asks for a mask that is causal, or a sliding window, and nothing else: what a kernel can do
    without one."""
    function = settings.get("mask_function", causal_mask_function)
    if function is causal_mask_function:
        return True
    return bool(_made_of(function) == _made_of(sliding_window_causal_mask_function(1)))


def _made_of(function: Any) -> Any:
    """The code of a mask function and of those that it combines; sizes of windows aside."""
    parts = [cell.cell_contents for cell in function.__closure__ or ()]
    inner = [part for cell in parts for part in (cell if isinstance(cell, tuple) else [cell]) if callable(part)]
    return function.__code__, [_made_of(part) for part in inner]


def attend(
    pack: Pack, query: Tensor, key: Tensor, value: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor] | None], settings: dict[str, Any],
) -> tuple[Tensor, None] | None:  # fmt: skip
    """Attention of each document to itself and to the prefix, through the pack's kernel.

    Args:
        query: `[packs, heads, width, dim]`; key, value: `[packs, kv_heads, width, dim]`.
        prefixes: for each pack keys and values before those of each of its documents, `[kv_heads, virtual tokens,
            dim]`, or None; one for all where they are alike.
        settings: what the attention function was called with besides.

    Returns:
        `[packs, width, heads, dim]`, as an attention function gives it; None where the kernel cannot do it.
    """
    window = settings.get("sliding_window")
    if (
        pack.kernel is None
        or settings.get("dropout")
        or any(settings.get(name) is not None for name in BEYOND_KERNELS)
        # a window would move past the prefix, which is seen from everywhere
        or (window is not None and any(prefixes))
        or (pack.kernel is flash_by_document and not flash_takes(query, key, value))
    ):
        return None
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    keys = pack.spans
    if any(prefixes):
        index, keys = pack.with_lead(tuple(0 if prefix is None else prefix[0].shape[1] for prefix in prefixes))
        leads = zip(*(prefix for prefix in prefixes if prefix is not None), strict=True)
        k, v = (
            torch.cat([*(lead.to(own.dtype).transpose(0, 1) for lead in each), own]).index_select(0, index)
            for each, own in zip(leads, (k, v), strict=True)
        )
    found = pack.kernel(q, k, v, pack.spans, keys, scale=settings.get("scaling"), window=window)
    return found.view(query.shape[0], query.shape[2], *found.shape[1:]), None
