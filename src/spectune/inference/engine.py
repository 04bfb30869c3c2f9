"""The decode engine: requests come and go, and each step every running one gets a token."""

import gc
import logging
from collections import deque
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from spectune.blocks.recorded_steps import Steps
from spectune.compute.cudnn import cudnn_attention
from spectune.deltas import Attachment
from spectune.errors import ConfigError, OutOfMemoryError, is_out_of_memory
from spectune.families import vocabulary_rows
from spectune.inference.decode_batch import DecodeBatch
from spectune.inference.decode_lanes import Lanes
from spectune.inference.engine_bases import family_of, text_limit, virtual_tokens
from spectune.inference.lane import Lane
from spectune.inference.prompt_passes import PASS_COSTS, PASS_COSTS_ON_GPU, cheapest_passes
from spectune.inference.request import Request, Ticket, Written
from spectune.inference.step_choice import steps_for

log = logging.getLogger("spectune")

#: steps to come, where nobody says
EXPECTED = 64


class Engine:
    """Writes for many requests at once, each under a delta of its own. One thread drives it.

    What a request gets depends on nothing but itself: greedy output is, token for token in float32, what transformers'
    `generate` writes for it alone; sampled output is a function of its seed.

    Args:
        model: in evaluation mode.
        rows: how many are written at once; further ones wait.
        pad_token_id: fills places without a token; any id will do.
        enter_at: wait until so many rows are free before prompts are run, where as many requests wait: a pass over
            several costs less than one over each. None: a quarter of the rows.
        expected_steps: about how many are to come: on CUDA they are recorded, or compiled, where that pays.
        steps: what runs a batch's steps, in place of what pays.

    Attributes:
        rows: fewer than were asked for once memory has run out.
        lanes: what the rows are written in.
    """

    def __init__(
        self, model: PreTrainedModel, *, rows: int = 16, pad_token_id: int = 0, enter_at: int | None = None,
        expected_steps: float = EXPECTED, steps: Callable[[DecodeBatch], Steps] | None = None,
    ) -> None:  # fmt: skip
        if rows < 1:
            raise ConfigError(f"rows = {rows}; expected at least 1")
        self.model, self.rows = model, rows
        self.enter_at = enter_at or max(1, rows // 4)
        self._limit = text_limit(model)
        self._pass_costs = PASS_COSTS if model.device.type == "cpu" else PASS_COSTS_ON_GPU
        steps = steps or steps_for(model, family_of(model), expected_steps)
        self.lanes = Lanes(model, pad_token_id, steps, rows)
        self._waiting: deque[Ticket] = deque()

    @property
    def running(self) -> int:
        """Rows that are being written."""
        return self.lanes.rows

    @property
    def waiting(self) -> int:
        """Requests that no row is free for yet."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self.running

    def free_for(self, waiting: int) -> int:
        """How many of so many requests that wait are to be given rows now; see `enter_at`."""
        free = min(self.rows - self.running, waiting)
        return free if not self.running or free >= min(self.enter_at, waiting) else 0

    def submit(self, request: Request) -> Ticket:
        """Take a request; a row is its own as soon as one is free. Raises ConfigError: no such delta; an empty prompt,
        one with ids that the model does not have, or one that leaves no room in its context."""
        attachment = Attachment.of(self.model)
        if request.delta is not None:
            known = {} if attachment is None else attachment.deltas
            if request.delta not in known:
                raise ConfigError(f"no delta {request.delta!r} is attached; attached are: {', '.join(known) or 'none'}")
            for _, module in known[request.delta].sites:
                module.eval()
        limit = self._limit - virtual_tokens(self.model, [request.delta])
        ticket = Ticket(request, room_for(request.ids, request.max_new_tokens, limit, vocabulary_rows(self.model)))
        self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Let go of a request; nothing more is written for it."""
        if ticket.finished is not None:
            return
        ticket.finished = "cancelled"
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            return
        for lane in self.lanes:
            if ticket in lane.tickets:
                lane.leave(ticket)

    def close(self) -> None:
        """Let go of what it put on the model (tables of deltas' weights), and of its rows."""
        self.lanes.close()
        self._waiting.clear()

    def step(self) -> list[Written]:
        """Run the prompts that there are rows for, then give each row a token."""
        return [*self.enter(), *self.advance()]

    def enter(self) -> list[Written]:
        """Run the prompts that there are rows for; the first token of each."""
        free = self.free_for(len(self._waiting))
        if free < 1:
            return []
        by_lane: dict[Lane, list[Ticket]] = {}
        for _ in range(free):
            ticket = self._waiting.popleft()
            by_lane.setdefault(self.lanes.of(ticket.request.delta), []).append(ticket)
        written: list[Written] = []
        with torch.no_grad(), cudnn_attention(False):
            for lane, tickets in by_lane.items():
                for numbers in cheapest_passes([lane.places(ticket) for ticket in tickets], self._pass_costs):
                    written += self._enter(lane, [tickets[number] for number in numbers])
        return written

    def advance(self) -> list[Written]:
        """A token for each row."""
        written: list[Written] = []
        with torch.no_grad(), cudnn_attention(False):
            for lane in self.lanes:
                written += self._advance(lane)
        self.lanes.tidy()
        return written

    def _enter(self, lane: Lane, tickets: Sequence[Ticket]) -> list[Written]:
        """Rows of one pass over their prompts. Where it fails, each by itself: one request's fault is its own."""
        try:
            return lane.enter(tickets)
        except Exception as error:
            for ticket in tickets:
                if ticket in lane.tickets:
                    lane.leave(ticket)
            memory = is_out_of_memory(error)
            if not memory and len(tickets) == 1:
                return [_failed(tickets[0], error)]
        if memory:
            return self._with_fewer(lane, tickets)
        return [written for ticket in tickets for written in self._enter(lane, [ticket])]

    def _advance(self, lane: Lane) -> list[Written]:
        try:
            return lane.advance()
        except Exception as error:
            if not is_out_of_memory(error):
                return self._again(lane, error)
        return self._with_fewer(lane, [])

    def _again(self, lane: Lane, error: Exception) -> list[Written]:
        """A step failed: its rows enter once more, where one that it is due to is found out; none does so twice."""
        failed = []
        for ticket in reversed(list(lane.tickets)):
            lane.leave(ticket)
            if ticket.failed or len(ticket.ids) >= ticket.room:
                failed.append(_failed(ticket, error))
            else:
                ticket.failed = True
                self._waiting.appendleft(ticket)
        return failed

    def _with_fewer(self, lane: Lane, tickets: Sequence[Ticket]) -> list[Written]:
        """Memory ran out: half of the rows wait again, with what they have written."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        entering, running = len(tickets), self.running
        if entering + running <= 1:
            alone = tickets[0] if tickets else lane.tickets[0]
            if not tickets:
                lane.leave(alone)
            return [_failed(alone, OutOfMemoryError(
                f"out of memory while writing one row of {len(alone.seen)} tokens. Try a shorter prompt, a smaller "
                "dtype, or another device."
            ))]  # fmt: skip
        self.rows = max(1, (entering + running) // 2)
        self.enter_at = min(self.enter_at, max(1, self.rows // 4))
        log.warning("out of memory while writing %d rows; again with %d", entering + running, self.rows)
        self._waiting.extendleft(reversed(tickets))
        while self.running > self.rows:
            # the newest rows wait: they lose least
            widest = max(self.lanes, key=lambda lane: len(lane.tickets))
            ticket = widest.tickets[-1]
            widest.leave(ticket)
            self._waiting.appendleft(ticket)
        for each in self.lanes:
            each.shrink()
        return []


def room_for(ids: Sequence[int], max_new_tokens: int, limit: float, vocabulary: int) -> int:
    """How many tokens may follow a prompt. Raises ConfigError: none, or the prompt is none that the base takes."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}; expected at least 1")
    if len(ids) == 0:
        raise ConfigError("the prompt is empty; a model needs at least one token to go on from")
    if max(ids) >= vocabulary or min(ids) < 0:
        raise ConfigError(
            f"the prompt holds the token id {max(ids) if max(ids) >= vocabulary else min(ids)}, and the base's "
            f"embedding has {vocabulary} rows"
        )
    room = int(min(max_new_tokens, limit - len(ids)))
    if room < 1:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens; this base takes {limit} and there must be room for one more"
        )
    return room


def _failed(ticket: Ticket, error: BaseException) -> Written:
    ticket.finished = "error"
    return Written(ticket, finished="error", error=error)
