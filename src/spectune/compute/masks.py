"""Masks and positions when something stands before the text, and what transformers asks of positions."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils


def mask_of_none(queries: int, keys: int, *, causal: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What attention without a mask sees, `[1, 1, queries, keys]`: all keys, or, `causal`, those up to the query's own,
    which then stands at the query's own number. Boolean (True attends), or additive where `dtype` is a floating one."""
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        visible = visible.tril()
    visible = visible[None, None]
    return visible if dtype == torch.bool else _additive(visible, dtype)


def widen_mask(mask: Tensor, lead: Tensor) -> Tensor:
    """An attention mask `[batch or 1, heads or 1, queries, extra + keys]` with `extra` keys before the text's.

    Args:
        mask: boolean (True attends) or additive, `[batch, heads or 1, queries, keys]`.
        lead: which of the keys in front are visible, boolean `[batch or 1, 1, queries or 1, extra]`.
    """
    if mask.dtype != torch.bool:
        lead = _additive(lead, mask.dtype)
    batch = max(mask.shape[0], lead.shape[0])
    return torch.cat(
        [lead.expand(batch, mask.shape[1], mask.shape[2], -1), mask.expand(batch, *mask.shape[1:])], dim=-1
    )


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def positions_from_mask(mask: Tensor, length: int) -> Tensor:
    """Positions `[batch, length]` (int64) of the last `length` tokens: the running count of real tokens, from 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


class OneTextRows:
    """Rows of one text each, whose positions a model makes by itself, and whose padding needs no mask.

    Without a mask transformers looks in every pass whether positions begin anew within a row (several texts in one
    sequence), and waits for the device to say so. Such positions are counted the same way in every batch: the first one
    is looked at for all. Some types also look for padding, to warn of it, and wait for that. With a mask it looks
    whether the mask hides anything: whoever gives one knows that it does.
    """

    def __init__(self) -> None:
        #: which of a pass's questions, by number, were answered with no
        self._known: set[int] = set()

    @contextlib.contextmanager
    def passes(self) -> Iterator[None]:
        """Inside, there is one forward pass, over such rows, which is given no positions."""
        ask, numbers = masking_utils.find_packed_sequence_indices, itertools.count()

        def find(position_ids: Tensor) -> Tensor | None:
            number = next(numbers)
            if number in self._known:
                return None
            found: Tensor | None = ask(position_ids)
            if found is None:
                self._known.add(number)
            return found

        def unneeded(padding_mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
            return padding_mask is None and look(padding_mask, *args, **kwargs)

        look: Callable[..., bool] = masking_utils._ignore_causal_mask_sdpa
        masking_utils._ignore_causal_mask_sdpa = unneeded
        warn = PreTrainedModel.warn_if_padding_and_no_attention_mask
        masking_utils.find_packed_sequence_indices = find
        PreTrainedModel.warn_if_padding_and_no_attention_mask = lambda *_, **__: None  # type: ignore[method-assign]
        try:
            yield
        finally:
            masking_utils.find_packed_sequence_indices = ask
            masking_utils._ignore_causal_mask_sdpa = look
            PreTrainedModel.warn_if_padding_and_no_attention_mask = warn  # type: ignore[method-assign]
