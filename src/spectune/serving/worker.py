"""The thread that owns the model: it takes orders into rows, steps the engine, and hands out what is written."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spectune.errors import SpectuneError, first_line
from spectune.serving.api_error import STOPPING, ApiError
from spectune.serving.orders import Job, Order, Piece, Score

if TYPE_CHECKING:
    from spectune.inference import Engine, Ticket, Written
    from spectune.inference.written_text import WrittenText
    from spectune.serving.loaded import Loaded

log = logging.getLogger("spectune")

#: steps that fail one after the other, with whatever rows they have, before the server gives up
_FAILURES = 5

Delivery = list[tuple[Job, Piece]]


@dataclass(eq=False)
class _Row:
    """A choice that waits or is being written. `held`: what is given back when it ends."""

    job: Job
    choice: int
    order: Order
    text: WrittenText
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    scores: list[Score] = field(default_factory=list)


class Worker:
    """Runs a model on a thread of its own.

    Args:
        load: makes the model, on that thread.
        post: takes what is new after each step, from that thread.
        loaded: called there once the model is loaded.
        failed: called there where the model could not be loaded, or where the engine fails again and again; nothing is
            written after that.
    """

    def __init__(
        self, load: Callable[[], Loaded], post: Callable[[Delivery], None], loaded: Callable[[Loaded], None],
        failed: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        self._load, self._post, self._loaded, self._failed = load, post, loaded, failed
        self._orders: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: deque[_Row] = deque()
        self._running: dict[Ticket, _Row] = {}
        self._stopped = self._ready = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="spectune-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a request's choices; they are written as soon as rows are free."""
        self._orders.put(job)

    def cancel(self, job: Job) -> None:
        """Nobody waits for a job any more: its rows leave before the next step."""
        job.cancelled = True
        self._orders.put(job)

    def stop(self, seconds: float = 10.0) -> bool:
        """End the thread after the step that it is at. Returns whether it has ended: what is being loaded is not
        waited for."""
        self._stopped = True
        self._orders.put(None)
        self._thread.join(seconds if self._ready else 0.0)
        return not self._thread.is_alive()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def _run(self) -> None:
        try:
            served = self._load()
            engine = served.engine()
        except BaseException as error:  # whatever it is, the HTTP side has to know
            self._failed(error)
            return
        self._ready = True
        if not self._stopped:
            self._loaded(served)
        while not self._stopped:
            try:
                self._turn(engine, served)
                self._failures = 0
            except Exception as error:
                self._failures += 1
                log.exception("a decoding step failed")
                self._give_up(engine, error)
                if self._failures >= _FAILURES:
                    failure = SpectuneError(f"decoding fails again and again: {first_line(error)}")
                    self._give_up(engine, failure, all_of=served)
                    self._failed(failure)
                    return
        self._give_up(engine, ApiError(503, STOPPING, code="stopping"), all_of=served)
        engine.close()

    def _turn(self, engine: Engine, served: Loaded) -> None:
        """New orders, then a step."""
        idle = not self._waiting and not self._running
        self._take(engine, served, wait=idle)
        posted = self._admit(engine, served)
        if self._running:
            for written in engine.step():
                posted += self._written(engine, written)
        if posted:
            self._post(posted)

    def _take(self, engine: Engine, served: Loaded, *, wait: bool) -> None:
        """What has been ordered and cancelled meanwhile; with `wait` until there is something."""
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._orders.get(block=wait)
                wait = False
                if job is None:
                    continue
                if job.cancelled:
                    self._drop(engine, job)
                    continue
                rows = (_Row(job, i, order, served.text(order.stops)) for i, order in enumerate(job.orders))
                self._waiting.extend(rows)

    def _drop(self, engine: Engine, job: Job) -> None:
        if any(row.job is job for row in self._waiting):
            self._waiting = deque(row for row in self._waiting if row.job is not job)
        for ticket, row in list(self._running.items()):
            if row.job is job:
                engine.cancel(ticket)
                self._leave(ticket)

    def _leave(self, ticket: Ticket) -> None:
        self._running.pop(ticket).held.close()

    def _admit(self, engine: Engine, served: Loaded) -> Delivery:
        """Give the rows that are free to those who wait, in the order in which they came; who cannot have one is told
        why."""
        refused: Delivery = []
        emptied = False
        if not engine.free_for(len(self._waiting)):
            return refused
        while self._waiting and len(self._running) < engine.rows:
            row = self._waiting[0]
            try:
                ticket = served.begin(engine, row.order, row.held)
            except Exception as error:
                row.held.close()
                if served.is_full(error):
                    if self._running:  # until a row ends
                        break
                    if not emptied:  # of tables that were made for rows which have ended
                        engine.close()
                        emptied = True
                        continue
                refused.append((row.job, Piece(row.choice, error=error)))
            else:
                self._running[ticket] = row
            self._waiting.popleft()
        return refused

    def _written(self, engine: Engine, written: Written) -> Delivery:
        """What a token is of its choice's text; nothing where no text came of it."""
        row = self._running.get(written.ticket)
        if row is None:  # the same step wrote its stop string already
            return []
        if written.error is not None:
            self._leave(written.ticket)
            return [(row.job, Piece(row.choice, error=written.error))]
        text, finished, tokens = "", written.finished, 0
        if written.token is not None:
            tokens = 1
            if row.order.logprobs is not None:
                start = len(row.text.known)
                row.scores.append(Score(written.token, float(written.logprob or 0.0), written.top, start))
            text = row.text.add(written.token)
        if row.text.found:
            if finished is None:
                engine.cancel(written.ticket)
            finished = "stop"
        elif finished is not None:
            text += row.text.end()
            finished = "stop" if row.text.found else finished
        if finished is not None:
            self._leave(written.ticket)
        return [(row.job, Piece(row.choice, text, tokens, _shown(row, finished is not None), finished))]

    def _give_up(self, engine: Engine, error: BaseException, all_of: Loaded | None = None) -> None:
        """Every row ends with an error; with `all_of` those that wait, too: nothing more is written."""
        lost: Delivery = []
        for ticket, row in list(self._running.items()):
            with contextlib.suppress(Exception):  # it has failed already
                engine.cancel(ticket)
            with contextlib.suppress(Exception):
                self._leave(ticket)
            lost.append((row.job, Piece(row.choice, error=error)))
        self._running.clear()
        if all_of is not None:
            with contextlib.suppress(Exception):  # a request that waits may be at fault
                self._take(engine, all_of, wait=False)
            lost += [(row.job, Piece(row.choice, error=error)) for row in self._waiting]
            self._waiting.clear()
        self._post(lost)


def _shown(row: _Row, ended: bool) -> tuple[Score, ...]:
    """The scores of tokens whose text has been given; those behind a stop string never are."""
    shown, length = row.scores, len(row.text.text)
    ready = [score for score in shown if score.start < length or (ended and not row.text.found)]
    row.scores = [] if ended else shown[len(ready) :]
    return tuple(ready)
