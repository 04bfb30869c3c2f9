"""Masks and positions when something stands before the text, and what transformers asks of positions."""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils


def widen_mask(mask: Tensor | None, query_length: int, text_keys: int, lead: Tensor) -> Tensor:
    """An attention mask `[batch or 1, heads or 1, queries, extra + keys]` with `extra` keys before the text's.

    Args:
        mask: boolean (True attends) or additive, `[batch, heads or 1, queries, keys]`; None means plainly causal.
        query_length, text_keys: lengths before widening, used where `mask` is None.
        lead: which of the keys in front are visible, boolean `[batch or 1, 1, queries or 1, extra]`.

    Raises:
        ValueError: no mask came and queries and keys differ in number, so that what may be seen is not known.
            (SDPA's own causal flag is aligned to the top left: with keys in front it would hide the newest ones.)
    """
    if mask is None:
        if query_length not in (1, text_keys):
            raise ValueError(f"no attention mask came with {query_length} queries over {text_keys} keys")
        visible = torch.ones(query_length, text_keys, dtype=torch.bool, device=lead.device)
        mask = visible.tril(text_keys - query_length)[None, None]
    if mask.dtype != torch.bool:
        hidden = torch.finfo(mask.dtype).min
        lead = torch.zeros(lead.shape, dtype=mask.dtype, device=lead.device).masked_fill(~lead, hidden)
    batch = max(mask.shape[0], lead.shape[0])
    return torch.cat(
        [lead.expand(batch, mask.shape[1], mask.shape[2], -1), mask.expand(batch, *mask.shape[1:])], dim=-1
    )


def positions_from_mask(mask: Tensor, length: int) -> Tensor:
    """Positions `[batch, length]` (int64) of the last `length` tokens: the running count of real tokens, from 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


class OneTextRows:
    """Rows of one text each, whose positions a model makes by itself, and whose padding needs no mask.

    Without a mask transformers looks in every pass whether positions begin anew within a row (several texts in one
    sequence), and waits for the device to say so. Such positions are counted the same way in every batch: the first one
    is looked at for all. Some types also look for padding, to warn of it, and wait for that.
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

        warn = PreTrainedModel.warn_if_padding_and_no_attention_mask
        masking_utils.find_packed_sequence_indices = find
        PreTrainedModel.warn_if_padding_and_no_attention_mask = lambda *_, **__: None  # type: ignore[method-assign]
        try:
            yield
        finally:
            masking_utils.find_packed_sequence_indices = ask
            PreTrainedModel.warn_if_padding_and_no_attention_mask = warn  # type: ignore[method-assign]
