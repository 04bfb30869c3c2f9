"""A cache with a row for each request: rows of unlike lengths, which come and go one by one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

#: places are added in steps of so many
STEP = 64


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, `[slots, capacity, kv_heads, dim]`."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache
        self.is_initialized = True  # `keys` and `values` stay None: nobody is to take ours for theirs
        self.stored: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: storage is made when rows come."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values, `[rows, kv_heads, 1, dim]`, at each row's place; gives all of the rows'
        keys and values up to the capacity in view, `[rows, kv_heads, capacity, dim]`."""
        cache = self.cache
        rows, capacity = cache.rows, cache.seen
        at = (cache.numbers[:rows], cache.places[:rows])
        found = []
        for stored, states in zip(self.stored, (key_states, value_states), strict=True):
            stored.index_put_(at, states[:, :, 0])
            found.append(stored[:rows, :capacity].transpose(1, 2))
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seen, 0

    def get_seq_length(self) -> int:
        return self.cache.seen - 1

    def get_max_length(self) -> int:
        return self.cache.capacity


class SlotCache(Cache):
    """Keys and values of up to `slots` rows.

    Attributes:
        places: where each row's next token goes, int64 `[slots]` on the device. Filled in place, but for `resize`.
        numbers: 0, 1, 2, ..., int64 `[slots]`.
        rows, seen: what is in view of the model: the first rows, and so many places of each.
        version: counts how often storage was made anew: what was recorded over the old one is void then.
    """

    layers: list[SlotLayer]  # type: ignore[assignment]

    def __init__(self, device: torch.device) -> None:
        super().__init__(layers=[])
        self.device = device
        self.slots = self.capacity = self.rows = self.seen = self.version = 0
        self.places = self.numbers = torch.empty(0, dtype=torch.int64, device=device)

    def view(self, rows: int, capacity: int) -> "SlotCache":
        """Show the model the first rows, and so many places of each."""
        self.rows, self.seen = rows, capacity
        return self

    def resize(self, slots: int, capacity: int) -> None:
        """Have so many slots and places, what is in those that stay kept."""
        if (slots, capacity) == (self.slots, self.capacity):
            return
        rows, places = min(slots, self.slots), min(capacity, self.capacity)
        for layer in self.layers:
            made = []
            for stored in layer.stored:
                # zeros: what is hidden counts nothing, unless it is no number
                grown = stored.new_zeros(slots, capacity, *stored.shape[2:])
                grown[:rows, :places] = stored[:rows, :places]
                made.append(grown)
            layer.stored = tuple(made)
        if slots != self.slots:
            numbers = torch.arange(slots, device=self.device)
            at = torch.zeros_like(numbers)
            at[:rows] = self.places[:rows]
            self.numbers, self.places = numbers, at
        self.slots, self.capacity = slots, capacity
        self.version += 1

    def enter(
        self, slots: Sequence[int], layers: Sequence[tuple[Tensor, Tensor]], padding: Sequence[int],
        leads: Sequence[int],
    ) -> None:  # fmt: skip
        """Put rows in, in place of what stood there.

        Args:
            slots: of each row.
            layers: keys and values of each layer, `[rows, kv_heads, length, dim]`, padded on the left.
            padding: places of padding before each row.
            leads: places that are left free before each row, for its prefix.
        """
        if not self.layers:
            self.layers.extend(SlotLayer(self) for _ in layers)
            for layer, pair in zip(self.layers, layers, strict=True):
                layer.stored = tuple(
                    states.new_zeros(self.slots, self.capacity, states.shape[1], states.shape[3]) for states in pair
                )
        length = layers[0][0].shape[2]
        host = torch.tensor([slots, padding, leads])
        slot, before, lead = host.to(self.device, non_blocking=True)
        number = torch.arange(length, device=self.device)
        to = lead[:, None] + number
        source = (before[:, None] + number).clamp(max=length - 1)[:, :, None, None] if any(padding) else None
        for layer, pair in zip(self.layers, layers, strict=True):
            for stored, states in zip(layer.stored, pair, strict=True):
                rows = states.transpose(1, 2)
                if source is not None:
                    rows = rows.gather(1, source.expand(-1, -1, *rows.shape[2:]))
                stored[slot] = 0
                stored[slot[:, None], to] = rows

    def put_before(self, slot: int, layer: int, prefix: Sequence[Tensor]) -> None:
        """Put a layer's learned keys and values, `[kv_heads, count, dim]`, before a row's own."""
        for stored, part in zip(self.layers[layer].stored, prefix, strict=True):
            stored[slot, : part.shape[1]] = part.transpose(0, 1)

    def move(self, source: int, target: int) -> None:
        """Put the row of one slot into another one."""
        for layer in self.layers:
            for stored in layer.stored:
                stored[target] = stored[source]
