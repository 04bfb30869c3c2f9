"""Rows that are written together: they enter with a pass over their prompts, and get a token each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from spectune.deltas import Attachment
from spectune.inference.decode_batch import Caller
from spectune.inference.drawing import draw, likelihoods
from spectune.inference.request import Ticket, Written
from spectune.inference.row_deltas import routed_as


class Lane(ABC):
    """Rows whose passes are alike.

    Attributes:
        tickets: of the rows, in their order.
    """

    def __init__(self, call: Caller, pad_token_id: int) -> None:
        self.call, self.pad_token_id = call, pad_token_id
        self.tickets: list[Ticket] = []

    def places(self, ticket: Ticket) -> int:
        """How many places the pass over a ticket's prompt has for it."""
        return len(ticket.seen)

    @abstractmethod
    def enter(self, tickets: Sequence[Ticket]) -> list[Written]:
        """Run the tickets' prompts, put them in as rows, and give the first token of each."""

    @abstractmethod
    def advance(self) -> list[Written]:
        """A step: one token more for each row."""

    @abstractmethod
    def leave(self, ticket: Ticket) -> None:
        """Take a row out."""

    @abstractmethod
    def shrink(self) -> None:
        """Let go of memory that no row needs."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what stands on the model."""

    @abstractmethod
    def reserve(self, places: int, slots: int) -> None:
        """Have a cache with so many places for each row; tables that are made will be for so many deltas at least."""

    @abstractmethod
    def make_room_for(self, name: str) -> None:
        """Have tables as this delta needs them."""

    @abstractmethod
    def adds_mixtures(self, adds: bool) -> None:
        """See `Lanes`."""

    @property
    def attachment(self) -> Attachment | None:
        return Attachment.of(self.call.model)

    def write(self, tickets: Sequence[Ticket], logits: Tensor, likeliest: Tensor) -> tuple[list[Written], Tensor]:
        """What the tickets get, noted on them, and as a tensor; rows that ended leave.

        Args:
            logits: `[rows, vocabulary]` float32, one row for each ticket, or more.
            likeliest: the likeliest token of each, int64 `[rows]`.
        """
        tokens = _chosen(tickets, logits, likeliest)
        asked = {number: t.request.logprobs for number, t in enumerate(tickets) if t.request.logprobs is not None}
        known = likelihoods(logits, tokens, asked)
        written = []
        for number, (ticket, token) in enumerate(zip(tickets, tokens.tolist(), strict=False)):
            logprob, top = known.get(number, (None, ()))
            stopped = token in ticket.request.stops
            if stopped:
                ticket.finished = "stop"
            else:
                ticket.ids.append(token)
                if len(ticket.ids) >= ticket.room:
                    ticket.finished = "length"
            if ticket.finished is not None:
                self.leave(ticket)
            written.append(Written(ticket, None if stopped else token, logprob, top, ticket.finished))
        return written, tokens


def _chosen(tickets: Sequence[Ticket], logits: Tensor, likeliest: Tensor) -> Tensor:
    """The token of each row, int64 `[rows]`: drawn where it is to be."""
    drawn = [(number, t) for number, t in enumerate(tickets) if t.draws is not None]
    if not drawn:
        return likeliest
    numbers = torch.tensor([number for number, _ in drawn]).to(logits.device, non_blocking=True)
    samplings = [t.request.sampling for _, t in drawn if t.request.sampling is not None]
    uniforms = [t.draws.random() for _, t in drawn if t.draws is not None]
    return likeliest.index_copy(0, numbers, draw(logits[numbers], samplings, uniforms))


class UncachedLane(Lane):
    """Rows of a base that the engine's cache does not go with: each token by a pass over its row's whole text, a row at
    a time."""

    def enter(self, tickets: Sequence[Ticket]) -> list[Written]:
        written: list[Written] = []
        for ticket in tickets:
            self.tickets.append(ticket)
            try:
                written += self._next(ticket)
            except Exception:
                self.leave(ticket)
                raise
        return written

    def advance(self) -> list[Written]:
        return [written for ticket in list(self.tickets) for written in self._next(ticket)]

    def leave(self, ticket: Ticket) -> None:
        self.tickets.remove(ticket)

    def shrink(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing stands there."""

    def reserve(self, places: int, slots: int) -> None:
        """There is no cache, and there are no tables."""

    def make_room_for(self, name: str) -> None:
        """Nothing is in tables."""

    def adds_mixtures(self, adds: bool) -> None:
        """Nothing is recorded."""

    def _next(self, ticket: Ticket) -> list[Written]:
        ids = torch.tensor([ticket.seen], device=self.call.model.device)
        with routed_as(self.call.model, [ticket.request.delta]):
            logits = self.call(ids, torch.ones_like(ids), None, None)
        return self.write([ticket], logits, logits.argmax(-1))[0]
