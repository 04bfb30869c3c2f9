"""One step of decoding: all rows of a batch get one token, each at its own place.

All that changes from step to step stands in tensors that are made once and filled in place, so that a step can be
recorded.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from spectune.data import padded
from spectune.inference.slot_cache import SlotCache


class Caller:
    """Calls a model for the logits of each row's last token. `probing`: past hooks that stand on the model as a whole,
    which count or keep what a user's own passes give."""

    def __init__(self, model: PreTrainedModel, *, probing: bool = False) -> None:
        self.model = model
        self.parameters = set(inspect.signature(model.forward).parameters)
        self.cache_name = "cache" if "cache" in self.parameters else "past_key_values"
        self._function: Any = model.forward if probing else model

    def __call__(self, ids: Tensor, mask: Any, positions: Tensor | None, cache: Cache | None) -> Tensor:
        """Logits `[rows, vocabulary]` float32 of the last of `ids` `[rows, length]`. No cache: none is made."""
        given: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self.parameters else {}
        if positions is not None:
            given["position_ids"] = positions
        if cache is not None:
            given[self.cache_name] = cache
        found: Tensor = self._function(
            input_ids=ids, attention_mask=mask, use_cache=cache is not None, **given
        ).logits  # fmt: skip
        return found[:, -1].float()

    def read(self, texts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """One pass over texts, padded on the left: the logits of the last token of each, and each layer's keys and
        values, `[rows, kv_heads, length, dim]`."""
        batch = padded(texts, pad_token_id, padding_side="left")
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache()  # of layers that keep everything: masks cut windows
        ids, mask, positions = (
            t.to(self.model.device) for t in (batch["input_ids"], batch["attention_mask"], positions)
        )  # fmt: skip
        logits = self(ids, mask, positions, cache)
        layers: list[Any] = cache.layers
        return logits, [(layer.keys, layer.values) for layer in layers]


class DecodeBatch:
    """The rows of one batch: their cache, and what the next step is of.

    Attributes:
        ids: each row's newest token, int64 `[slots, 1]`.
        lead: how many places of each row are visible however far back they are, int64 `[slots]`.
        index: the slot of each row's delta in tables, int64 `[slots]`.
    """

    def __init__(
        self, call: Caller, windows: dict[str, int | None], routed: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.call, self.windows, self.routed = call, windows, routed
        self.cache = SlotCache(call.model.device)
        self.ids = self.lead = self.index = torch.empty(0, dtype=torch.int64, device=call.model.device)

    def resize(self, slots: int, capacity: int) -> None:
        """As `SlotCache.resize`."""
        if slots != self.cache.slots:
            self.ids = torch.zeros(slots, 1, dtype=torch.int64, device=self.cache.device)
            self.lead, self.index = torch.zeros(2, slots, dtype=torch.int64, device=self.cache.device)
        self.cache.resize(slots, capacity)

    def write(
        self, tokens: Sequence[int], places: Sequence[int], lead: Sequence[int] = (), index: Sequence[int] = ()
    ) -> None:
        """Set what the next step is of: each row's newest token, its place, how much of it is always visible, and the
        slot of its delta."""
        given = [[*row, *[0] * (self.cache.slots - len(row))] for row in (tokens, places, lead, index)]
        ids, at, always, slots = torch.tensor(given).to(self.cache.device, non_blocking=True)
        self.ids[:, 0] = ids
        self.cache.places.copy_(at)
        self.lead.copy_(always)
        self.index.copy_(slots)

    def advance(self, tokens: Tensor) -> None:
        """The next step is of these tokens, int64 `[rows]`, of the first rows."""
        rows = tokens.shape[0]
        self.ids[:rows, 0] = tokens
        self.cache.places[:rows] += 1

    def run(self, rows: int, capacity: int) -> Tensor:
        """Logits `[rows, vocabulary]` float32 of the next tokens."""
        positions = self.cache.places[:rows, None]
        with self.routed():
            return self.call(
                self.ids[:rows], self.masks(rows, capacity), positions, self.cache.view(rows, capacity)
            )  # fmt: skip

    def masks(self, rows: int, capacity: int) -> Tensor | dict[str, Tensor]:
        """What each row sees, `[rows, 1, 1, capacity]`; several by kind of layer, where the base has several."""
        made = {kind: self._mask(rows, capacity, window) for kind, window in self.windows.items()}
        return made if len(made) > 1 else next(iter(made.values()))

    def _mask(self, rows: int, capacity: int, window: int | None) -> Tensor:
        here, place = self.cache.places[:rows, None], torch.arange(capacity, device=self.cache.device)
        seen = place <= here
        if window is not None:
            seen &= (place > here - window) | (place < self.lead[:rows, None])
        return as_attention_takes_it(seen[:, None, None], self.call.model)


def as_attention_takes_it(seen: Tensor, model: PreTrainedModel) -> Tensor:
    """A boolean mask as the model's attention wants it: eager attention adds it to its scores."""
    if "eager" not in str(model.config.get_text_config()._attn_implementation):
        return seen
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(~seen, lowest)
