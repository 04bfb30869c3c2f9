"""Masks and positions when something stands before the text."""

from __future__ import annotations

import torch
from torch import Tensor


def widen_mask(mask: Tensor | None, query_length: int, text_keys: int, extra: int, device: torch.device) -> Tensor:
    """An attention mask `[batch or 1, heads or 1, queries, extra + keys]` in which `extra` leading keys are visible.

    Args:
        mask: boolean (True attends) or additive, `[batch, heads or 1, queries, keys]`; None means plainly causal.
        query_length, text_keys: lengths before widening, used where `mask` is None.
        extra: keys that stand before the text and are visible from every position, padding queries included.

    Raises:
        ValueError: no mask came and queries and keys differ in number, so that what may be seen is not known.
            (SDPA's own causal flag is aligned to the top left: with keys in front it would hide the newest ones.)
    """
    if mask is None:
        if query_length not in (1, text_keys):
            raise ValueError(f"no attention mask came with {query_length} queries over {text_keys} keys")
        visible = torch.ones(query_length, text_keys, dtype=torch.bool, device=device)
        mask = visible.tril(text_keys - query_length)[None, None]
    lead = mask.new_ones(1) if mask.dtype == torch.bool else mask.new_zeros(1)
    return torch.cat([lead.expand(*mask.shape[:-1], extra), mask], dim=-1)


def positions_from_mask(mask: Tensor, length: int) -> Tensor:
    """Positions `[batch, length]` (int64) of the last `length` tokens: the running count of real tokens, from 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
