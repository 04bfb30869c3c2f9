"""One step of decoding: all rows of a batch get one token, each at its own place.

All that changes from step to step stands in tensors that are made once and filled in place, so that a step can be
recorded.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from spectune.deltas import Attachment
from spectune.inference.slot_cache import SlotCache

#: `run(rows, capacity)`: logits `[rows, vocabulary]` float32 of the batch's first rows, seeing so many places of each
Run = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class StepOutput:
    """What a step gives; it holds until the next one. `logits` `[rows, vocabulary]` float32, `tokens` the likeliest,
    int64 `[rows]`."""

    logits: Tensor
    tokens: Tensor


class Steps(Protocol):
    """How steps are run: as they are (`PlainSteps`), or recorded."""

    def rows_for(self, active: int) -> int:
        """How many rows to run where so many are written."""

    def capacity_for(self, needed: int, capacity: int) -> int:
        """How many places to see where `needed` are filled, of a cache of `capacity`."""

    def __call__(self, rows: int, capacity: int) -> StepOutput:
        """Run one."""

    def forget(self) -> None:
        """What was recorded is void."""


class PlainSteps:
    """Runs each step as it is."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def rows_for(self, active: int) -> int:
        return active

    def capacity_for(self, needed: int, capacity: int) -> int:
        return needed

    def __call__(self, rows: int, capacity: int) -> StepOutput:
        logits = self.run(rows, capacity)
        return StepOutput(logits, logits.argmax(-1))

    def forget(self) -> None:
        """Nothing is recorded."""


class Caller:
    """Calls a model for the logits of each row's last token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.parameters = set(inspect.signature(model.forward).parameters)
        self.cache_name = "cache" if "cache" in self.parameters else "past_key_values"

    def __call__(self, ids: Tensor, mask: Any, positions: Tensor, cache: SlotCache | DynamicCache) -> Tensor:
        """Logits `[rows, vocabulary]` float32 of the last of `ids` `[rows, length]`."""
        last = {"logits_to_keep": 1} if "logits_to_keep" in self.parameters else {}
        # the bare call, without hooks that stand on the whole model, is the probes'
        found: Tensor = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{self.cache_name: cache},
            **last,
        ).logits  # fmt: skip
        return found[:, -1].float()


class DecodeBatch:
    """The rows of one batch: their cache, and what the next step is of.

    Attributes:
        ids: each row's newest token, int64 `[slots, 1]`.
        lead: how many places of each row are visible however far back they are, int64 `[slots]`.
        names: the delta of each row in `rows`, as the step is to be routed.
    """

    def __init__(
        self, call: Caller, windows: dict[str, int | None], routed: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.call, self.windows, self.routed = call, windows, routed
        self.cache = SlotCache(call.model.device)
        self.ids = self.lead = torch.empty(0, dtype=torch.int64, device=call.model.device)

    def resize(self, slots: int, capacity: int) -> None:
        """As `SlotCache.resize`."""
        if slots != self.cache.slots:
            self.ids = torch.zeros(slots, 1, dtype=torch.int64, device=self.cache.device)
            self.lead = torch.zeros(slots, dtype=torch.int64, device=self.cache.device)
        self.cache.resize(slots, capacity)

    def write(self, rows: list[tuple[int, int, int]]) -> None:
        """Set each row's newest token, its place and how much of it is always visible."""
        more = [(0, 0, 0)] * (self.cache.slots - len(rows))
        ids, places, lead = torch.tensor([*rows, *more]).T.contiguous().to(self.cache.device, non_blocking=True)
        self.ids[:, 0] = ids
        self.cache.places.copy_(places)
        self.lead.copy_(lead)

    def advance(self, tokens: Tensor) -> None:
        """The next step is of these tokens, int64 `[rows]`."""
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


def attachment_of(model: PreTrainedModel) -> Attachment | None:
    """The deltas of a model."""
    return Attachment.of(model)
