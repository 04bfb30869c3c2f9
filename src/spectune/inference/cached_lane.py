"""Rows that are written in one batch, over a cache with a row for each."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from spectune.blocks.recorded_steps import PlainSteps, Steps
from spectune.deltas import AttentionModule, InputModule
from spectune.inference.decode_batch import Caller, DecodeBatch
from spectune.inference.lane import Lane
from spectune.inference.request import Ticket, Written
from spectune.inference.row_deltas import LEAST_SLOTS, RowDeltas
from spectune.inference.slot_cache import STEP


@dataclass
class Filled:
    """Of a row's cache: how many places are filled, and how many of these are visible however far back they are."""

    places: int
    lead: int


class CachedLane(Lane):
    """The rows in slots 0, 1, 2, ... of a batch. `most`: so many rows are to come."""

    def __init__(
        self, call: Caller, pad_token_id: int, windows: dict[str, int | None], steps: Callable[[DecodeBatch], Steps],
        most: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(call, pad_token_id)
        self.filled: list[Filled] = []
        self.batch = DecodeBatch(call, windows, lambda: self.deltas.routed())
        self.steps, self._plain = steps(self.batch), PlainSteps(self.batch.run)
        # sizes that do not change: with others, steps are made anew
        self._least_rows = self.steps.rows_for(most) if self.steps.costly else 1
        self.deltas = RowDeltas(call.model, self.batch, always_tables=not isinstance(self.steps, PlainSteps))
        self._recorded: object = None  # what steps that were recorded read
        self._changed = True

    def places(self, ticket: Ticket) -> int:
        name = ticket.request.delta
        if self.attachment is None or name not in self.attachment.deltas:  # the pass itself will say so
            return len(ticket.seen)
        return len(ticket.seen) + self._virtual_tokens(name)[0]

    def enter(self, tickets: Sequence[Ticket]) -> list[Written]:
        tickets = sorted(tickets, key=self._kind)  # rows of one kind side by side need not be put so at each site
        names = [ticket.request.delta for ticket in tickets]
        running = [ticket.request.delta for ticket in self.tickets]
        self._changed = True  # whatever happens: tables may be made anew
        try:
            with self.deltas.entering(names, running):
                logits, layers = self.call.read([ticket.seen for ticket in tickets], self.pad_token_id)
        except BaseException:
            self.deltas.keep(running)
            raise
        virtual = [self._virtual_tokens(name) for name in names]
        length = layers[0][0].shape[2]
        own = [len(ticket.seen) + in_text for ticket, (in_text, _, _) in zip(tickets, virtual, strict=True)]
        leads = [before for _, before, _ in virtual]
        first = len(self.tickets)
        slots = range(first, first + len(tickets))
        self._make_room(slots.stop, length + max(leads) + 1, max(ticket.room for ticket in tickets))
        self.batch.cache.enter(slots, layers, [length - count for count in own], leads)
        for slot, name, lead in zip(slots, names, leads, strict=True):
            for layer, prefix in self._prefixes(name) if lead else ():
                self.batch.cache.put_before(slot, layer, prefix)
        self.tickets += tickets
        self.filled += [Filled(count + before, always) for count, (_, before, always) in zip(own, virtual, strict=True)]
        return self.write(tickets, logits, logits.argmax(-1))[0]

    def advance(self) -> list[Written]:
        if not self.tickets:
            return []
        cache = self.batch.cache
        needed = 1 + max(row.places for row in self.filled)
        self._make_room(len(self.tickets), needed, max(ticket.room - len(ticket.ids) for ticket in self.tickets))
        rows = min(self.steps.rows_for(len(self.tickets)), cache.slots)
        if self._changed:
            slots = self.deltas.choose([ticket.request.delta for ticket in self.tickets], rows)
            newest = [ticket.ids[-1] for ticket in self.tickets]
            self.batch.write(newest, [row.places for row in self.filled], [row.lead for row in self.filled], slots)
            self._changed = False
        if self._recorded != (reads := (cache.version, self.deltas.version)):
            self.steps.forget()
            self._recorded = reads
        steps, how = self.steps, self.deltas.how
        found = (self._plain if how is None else steps)(rows, steps.capacity_for(needed, cache.capacity), how)
        for row in self.filled:
            row.places += 1
        written, tokens = self.write(list(self.tickets), found.logits, found.tokens)
        if not self._changed:
            self.batch.advance(tokens[: len(written)])
        return written

    def leave(self, ticket: Ticket) -> None:
        """Take a row out; the last one moves into its slot."""
        slot, last = self.tickets.index(ticket), len(self.tickets) - 1
        if slot != last:
            self.batch.cache.move(last, slot)
            self.tickets[slot], self.filled[slot] = self.tickets[last], self.filled[last]
        self.tickets.pop()
        self.filled.pop()
        self.deltas.keep({ticket.request.delta for ticket in self.tickets})
        self._changed = True

    def close(self) -> None:
        self.deltas.close()

    def reserve(self, places: int, slots: int) -> None:
        self._make_room(1, places, 0)
        self.deltas.least_slots = max(LEAST_SLOTS, slots)

    def make_room_for(self, name: str) -> None:
        self.deltas.make_room_for(name)

    def adds_mixtures(self, adds: bool) -> None:
        if self.deltas.mixtures is not None:
            self.deltas.mixtures.complete = not adds

    def shrink(self) -> None:
        self.batch.resize(len(self.tickets), max((row.places + 1 for row in self.filled), default=0))
        self._changed = True

    def _make_room(self, slots: int, places: int, more: int) -> None:
        """Slots for so many rows and so many places of each. `more`: tokens that are still to come for a row."""
        cache = self.batch.cache
        slots, capacity = max(self._least_rows, self.steps.rows_for(slots)), cache.capacity
        if places > capacity:
            # half as much again, so that not every step copies all; no more than will be used
            wanted = min(places + max(places // 2, STEP), places + more)
            capacity = self.steps.capacity_for(-(-wanted // STEP) * STEP, sys.maxsize)
        if slots > cache.slots or capacity > cache.capacity:
            self.batch.resize(max(slots, cache.slots), capacity)
            self._changed = True

    def _kind(self, ticket: Ticket) -> tuple[str, str]:
        """Of a row, for their order: what its delta is of, and which one it is."""
        name = ticket.request.delta
        delta = None if self.attachment is None or name is None else self.attachment.deltas.get(name)
        return ("", "") if delta is None else (delta.method.name, delta.name)

    def _virtual_tokens(self, name: str | None) -> tuple[int, int, int]:
        """Of a delta: virtual tokens in the sequence, those in front of it, and how many of these no window hides."""
        if self.attachment is None or name is None:
            return 0, 0, 0
        count = self.attachment.state.count_of(name)
        modules = [module for _, module in self.attachment.deltas[name].sites]
        if any(isinstance(module, InputModule) for module in modules):
            return count, 0, 0
        slides = any(isinstance(module, AttentionModule) and module.slides for module in modules)
        return 0, count, 0 if slides else count

    def _prefixes(self, name: str | None) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """A delta's learned keys and values, by the number of the layer in the cache."""
        assert self.attachment is not None, "a prefix is attached"
        assert name is not None, "the bare base has no prefix"
        for site, module in self.attachment.deltas[name].sites:
            if isinstance(module, AttentionModule):
                yield int(self.call.model.get_submodule(site.path).layer_idx), module()  # type: ignore[arg-type]
