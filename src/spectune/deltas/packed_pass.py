"""What a forward pass over a packed batch does otherwise: at the decoder's entry, in masks and in attention.

What stands before a document (virtual tokens, a prefix) stands before each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from spectune.compute.pack_layout import Pack
from spectune.compute.varlen import flash_by_document, flash_takes
from spectune.deltas.leading_keys import BEYOND_KERNELS
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from spectune.deltas.decoder import DecoderSite
    from spectune.deltas.rows import Rows


def enter(site: DecoderSite, call: dict[str, Any], rows: Rows, prompt: Tensor | None, shift: int) -> Tensor | None:
    """Make a decoder's call that of a packed batch, in place.

    Args:
        call: by argument name.
        rows: with the pack of the text; it is given the one with virtual tokens.
        prompt: embeddings that go before each document, `[virtual tokens, hidden]`.
        shift: how far positions move.

    Returns:
        with a prompt, where each place of the text stands now, `[packs, length]`.
    """
    registry, pack = site.registry, rows.pack
    assert pack is not None
    if call.get("attention_mask") is not None:
        raise ConfigError("a packed batch has no attention mask: `documents` say what is padding")
    positions = call.get("position_ids")
    if site.takes_positions:
        call["position_ids"] = (pack.positions if positions is None else positions) + shift
    table = registry.family.position_table
    if table is not None and shift and pack.longest + shift > table:
        raise ConfigError(
            f"a document of {pack.longest} tokens and {shift} virtual ones need {pack.longest + shift} positions; this "
            f"base has {table}. Use at most {table - shift} text tokens, or fewer virtual ones."
        )
    moved = None
    if prompt is not None:
        if call.get("token_type_ids") is not None:
            raise ConfigError(
                "token_type_ids do not go with prompt tuning: virtual tokens have no type. Leave them out."
            )
        pack, source, moved = pack.grown(prompt.shape[0])
        embeds = call.get("inputs_embeds")
        if embeds is None:
            embeds = registry.model.get_submodule(registry.family.embedding)(call["input_ids"])
        prompt = prompt.to(dtype=embeds.dtype, device=embeds.device)
        row = torch.arange(embeds.shape[0], device=embeds.device)[:, None]
        text, virtual = embeds[row, source.clamp(min=0)], prompt[(-1 - source).clamp(min=0)]
        call["input_ids"] = None
        call["inputs_embeds"] = torch.where((source < 0)[..., None], virtual, text)
        if site.takes_positions:
            call["position_ids"] = pack.positions
    # all ones: whatever a model makes of its mask or its positions by itself, what our mask function says is added
    call["attention_mask"] = torch.ones(pack.documents.shape, dtype=torch.int64, device=pack.device)
    pack.prepare(shift if prompt is None else 0)
    rows.pack, rows.length = pack, pack.width
    registry.lay(rows)
    return moved


def mask_of(make: Callable[..., Tensor | None], pack: Pack, settings: dict[str, Any]) -> Tensor | None:
    """Transformers' own mask, as it is for each document alone. `settings`: of transformers' mask function."""
    function = settings.get("mask_function", causal_mask_function)
    settings = {**settings, "mask_function": pack.within(function), "attention_mask": None}
    return make(**{**settings, "allow_is_causal_skip": False})


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
    pack: Pack,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    settings: dict[str, Any],
) -> tuple[Tensor, None] | None:
    """Attention of each document to itself and to the prefix, through the pack's kernel.

    Args:
        query: `[packs, heads, width, dim]`; key, value: `[packs, kv_heads, width, dim]`.
        prefix: keys and values before each document's, `[kv_heads, virtual tokens, dim]`.
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
        or (prefix is not None and window is not None)
        or (pack.kernel is flash_by_document and not flash_takes(query, key, value))
    ):
        return None
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    keys = pack.spans
    if prefix is not None:
        index, keys = pack.with_lead(prefix[0].shape[1])
        k, v = (
            torch.cat([lead.to(own.dtype).transpose(0, 1), own]).index_select(0, index)
            for lead, own in zip(prefix, (k, v), strict=True)
        )
    found = pack.kernel(q, k, v, pack.spans, keys, scale=settings.get("scaling"), window=window)
    return found.view(query.shape[0], query.shape[2], *found.shape[1:]), None
