"""Rows that are written in one batch: they enter with a pass over their prompts, and get a token each step."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from spectune.data import padded
from spectune.deltas import Attachment, AttentionModule, InputModule, Route, route
from spectune.inference.decode_batch import Caller, DecodeBatch, Run, StepOutput, Steps
from spectune.inference.drawing import draw
from spectune.inference.request import Ticket, Written
from spectune.inference.slot_cache import STEP


@dataclass
class Row:
    """A ticket's place in the batch. `places`: filled ones of its cache; `lead`: those that are always visible."""

    ticket: Ticket
    places: int
    lead: int


class Lane:
    """The rows in slots 0, 1, 2, ... of a batch. `mixes`: rows of different deltas share its passes; otherwise all are
    of one."""

    def __init__(
        self, call: Caller, windows: dict[str, int | None], steps: Callable[[Run], Steps], pad_token_id: int
    ) -> None:
        self.call, self.pad_token_id = call, pad_token_id
        self.rows: list[Row] = []
        self.batch = DecodeBatch(call, windows, self._routed)
        self.steps = steps(self.batch.run)
        self._version = 0
        self._changed = False
        self._route: Route | None = None

    def enter(self, tickets: Sequence[Ticket]) -> list[Written]:
        """Run the tickets' prompts, put them in as rows, and give the first token of each."""
        model = self.call.model
        names = [ticket.request.delta for ticket in tickets]
        batch = padded([ticket.seen for ticket in tickets], self.pad_token_id, padding_side="left")
        mask = batch["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache()  # type: ignore[no-untyped-call]  # of full layers: a window's are cut by masks
        ids, mask, positions = (t.to(model.device) for t in (batch["input_ids"], mask, positions))
        with self._prefilling(names):
            logits = self.call(ids, mask, positions, cache)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        virtual = [self._virtual_tokens(name) for name in names]
        length = layers[0][0].shape[2]
        own = [len(ticket.seen) + in_text for ticket, (in_text, _, _) in zip(tickets, virtual, strict=True)]
        leads = [before for _, before, _ in virtual]
        slots = range(len(self.rows), len(self.rows) + len(tickets))
        self._make_room(slots.stop, length + max(leads) + 1)
        self.batch.cache.enter(slots, layers, [length - count for count in own], leads)
        for slot, name, lead in zip(slots, names, leads, strict=True):
            if lead:
                for layer, prefix in self._prefixes(name):
                    self.batch.cache.put_before(slot, layer, prefix)
        self.rows += [
            Row(ticket, count + before, always)
            for ticket, count, (_, before, always) in zip(tickets, own, virtual, strict=True)
        ]
        self._changed = True
        tokens = self._chosen(tickets, StepOutput(logits, logits.argmax(-1)))
        return self._note(tickets, tokens, logits)

    def advance(self) -> list[Written]:
        """A step: one token more for each row."""
        if not self.rows:
            return []
        tickets = [row.ticket for row in self.rows]
        needed = 1 + max(row.places for row in self.rows)
        self._make_room(len(self.rows), needed)
        cache = self.batch.cache
        if self._changed:
            self.batch.write([(row.ticket.ids[-1], row.places, row.lead) for row in self.rows])
            self._changed = False
            self._route = None
        if self._version != cache.version:
            self.steps.forget()
            self._version = cache.version
        rows = self.steps.rows_for(len(tickets))
        found = self.steps(rows, self.steps.capacity_for(needed, cache.capacity))
        tokens = self._chosen(tickets, found)
        self.batch.advance(tokens)
        for row in self.rows:
            row.places += 1
        return self._note(tickets, tokens[: len(tickets)], found.logits)

    def leave(self, ticket: Ticket) -> None:
        """Take a row out; the last one moves into its slot."""
        slot = next(number for number, row in enumerate(self.rows) if row.ticket is ticket)
        last = len(self.rows) - 1
        if slot != last:
            self.batch.cache.move(last, slot)
            self.rows[slot] = self.rows[last]
        self.rows.pop()
        self._changed = True

    def shrink(self) -> None:
        """Let go of memory that no row needs."""
        if self.rows:
            self.batch.resize(len(self.rows), 1 + max(row.places for row in self.rows))
        else:
            self.batch.resize(0, 0)
        self._changed = True

    def _chosen(self, tickets: Sequence[Ticket], found: StepOutput) -> Tensor:
        """The token of each row, int64 `[rows]`."""
        drawn = [(number, t) for number, t in enumerate(tickets) if t.draws is not None]
        if not drawn:
            return found.tokens
        numbers = torch.tensor([number for number, _ in drawn]).to(found.tokens.device, non_blocking=True)
        samplings = [t.request.sampling for _, t in drawn if t.request.sampling is not None]
        uniforms = [t.draws.random() for _, t in drawn if t.draws is not None]
        return found.tokens.index_copy(0, numbers, draw(found.logits[numbers], samplings, uniforms))

    def _note(self, tickets: Sequence[Ticket], tokens: Tensor, logits: Tensor) -> list[Written]:
        """What was written, noted on the tickets; rows that ended leave."""
        likely = self._likelihoods(tickets, tokens, logits)
        written = []
        for number, (ticket, token) in enumerate(zip(tickets, tokens.tolist(), strict=True)):
            logprob, top = likely.get(number, (None, ()))
            stopped = token in ticket.request.stops
            ticket.ids.append(token)
            if stopped:
                ticket.finished = "stop"
            elif len(ticket.ids) >= ticket.room:
                ticket.finished = "length"
            if ticket.finished is not None:
                self.leave(ticket)
            if stopped:
                ticket.ids.pop()
            written.append(Written(ticket, None if stopped else token, logprob, top, ticket.finished))
        return written

    def _likelihoods(
        self, tickets: Sequence[Ticket], tokens: Tensor, logits: Tensor
    ) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        """By row what it asked for: log p of its token, and the likeliest tokens with theirs."""
        asked = {number: t.request.logprobs for number, t in enumerate(tickets) if t.request.logprobs is not None}
        if not asked:
            return {}
        numbers = torch.tensor(list(asked)).to(logits.device)
        logs = logits[numbers].log_softmax(-1)
        own = logs.gather(-1, tokens[numbers, None])[:, 0].tolist()
        most = logs.topk(min(max(asked.values()), logs.shape[-1]), dim=-1)
        rows = zip(asked.items(), own, most.indices.tolist(), most.values.tolist(), strict=True)
        return {
            number: (logprob, tuple(zip(ids, values, strict=True))[:count])
            for (number, count), logprob, ids, values in rows
        }

    def _make_room(self, slots: int, places: int) -> None:
        """Slots for so many rows and so many places of each."""
        cache = self.batch.cache
        most = max((row.ticket.room - len(row.ticket.ids) + row.places for row in self.rows), default=0)
        if slots > cache.slots or places > cache.capacity:
            wanted = min(max(places + places // 2, STEP), max(places, most))
            capacity = max(cache.capacity, -(-wanted // STEP) * STEP if places > cache.capacity else 0)
            self.batch.resize(max(slots, cache.slots), capacity)

    @property
    def _attachment(self) -> Attachment | None:
        return Attachment.of(self.call.model)

    def _virtual_tokens(self, name: str | None) -> tuple[int, int, int]:
        """Of a delta: virtual tokens in the sequence, those in front of it, and how many of these no window hides."""
        attachment = self._attachment
        if attachment is None or name is None:
            return 0, 0, 0
        count = attachment.state.count_of(name)
        modules = [module for _, module in attachment.deltas[name].sites]
        if any(isinstance(module, InputModule) for module in modules):
            return count, 0, 0
        learned = [module for module in modules if isinstance(module, AttentionModule)]
        return 0, count, 0 if learned and learned[0].slides else count

    def _prefixes(self, name: str | None) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """A delta's learned keys and values by the number of the layer in the cache."""
        attachment = self._attachment
        assert attachment is not None, "a prefix is attached"
        assert name is not None, "the bare base has none"
        delta = attachment.deltas[name]
        for site, module in delta.sites:
            if isinstance(module, AttentionModule):
                host = attachment.model.get_submodule(site.path)
                yield int(host.layer_idx), module()  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _prefilling(self, names: Sequence[str | None]) -> Iterator[None]:
        """The route of a pass over prompts."""
        attachment = self._attachment
        current = None if attachment is None else attachment.state.current
        if current is None or (not current.per_row and set(current.names) == set(names)):
            yield
        else:
            with route(self.call.model, list(names) if len(set(names)) > 1 else names[0]):
                yield

    @contextlib.contextmanager
    def _routed(self) -> Iterator[None]:
        """The route of a step."""
        attachment = self._attachment
        if attachment is None:
            yield
            return
        names = [row.ticket.request.delta for row in self.rows]
        if attachment.tuned is not None:
            with self._prefilling(names[:1]):
                yield
            return
        if self._route is None:
            self._route = Route(names, per_row=len(set(names)) > 1, cached=True)
        with attachment.state.routed(self._route):
            yield
