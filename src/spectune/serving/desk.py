"""Between HTTP and the worker: what may come in, what it is in tokens, and what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectune.errors import (
    ConfigError,
    DataError,
    DoesNotFitError,
    OutOfMemoryError,
    SpectuneError,
    did_you_mean,
    first_line,
)
from spectune.serving.api_error import STOPPING, ApiError, invalid
from spectune.serving.asked_prompts import AskedPrompts, room_for
from spectune.serving.bounds import Bounds
from spectune.serving.catalogue import Catalogue, Entry
from spectune.serving.counters import Counters
from spectune.serving.openai_format import Answer
from spectune.serving.orders import Job, Order, Piece
from spectune.serving.wanted import Wanted
from spectune.serving.worker import Delivery, Worker

if TYPE_CHECKING:
    from spectune.data.asking import PromptForm
    from spectune.serving.loaded import Loaded

log = logging.getLogger("spectune")

#: names that one which does not exist is compared with
_COMPARED = 500
#: folders that are read at once, so that a slow disk holds up no other request
_READERS = 4


@dataclass
class _Places:
    """Places in the queue that a request has."""

    left: int


class Desk:
    """Takes requests on the event loop's thread, while the worker loads and writes on its own.

    Attributes:
        state: "loading", "ok", "stopping" or "failed".
        failure: why it is "failed".
        choices: that were taken and are not written.
    """

    def __init__(self, catalogue: Catalogue, bounds: Bounds, counters: Counters) -> None:
        self.catalogue, self.bounds, self.counters = catalogue, bounds, counters
        self.state = "loading"
        self.failure: BaseException | None = None
        self.choices = 0
        self._ready: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(_looked_at)
        # tokenizers and templates run on one thread, files of deltas are read on others: none waits for a step
        self._encoding = ThreadPoolExecutor(1, "spectune-encoding")
        self._reading = ThreadPoolExecutor(_READERS, "spectune-reading")
        self._prompts = AskedPrompts()
        self.worker: Worker | None = None

    def open(self, worker: Worker) -> None:
        """Begin with a worker."""
        self.worker = worker
        worker.start()

    def loaded(self, loaded: Loaded) -> None:
        if not self._ready.done():
            self._ready.set_result(loaded)
            self.state = "ok" if self.state == "loading" else self.state

    @property
    def bank(self) -> Any:
        """The bank of what is loaded; None where there is none yet."""
        return self._ready.result().bank if self._ready.done() and self._ready.exception() is None else None

    def failed(self, error: BaseException) -> None:
        """The model could not be loaded, or writes no more."""
        self.state, self.failure = "failed", error
        if not self._ready.done():
            self._ready.set_exception(ApiError(503, "the model could not be loaded; the server stops"))

    def delivered(self, delivery: Delivery) -> None:
        """What is new of some choices."""
        for job, piece in delivery:
            if not job.cancelled:
                job.deliver(piece)

    def stop_taking(self) -> None:
        """No new requests."""
        self.state = "stopping" if self.state != "failed" else self.state

    def close(self) -> None:
        """No request is left."""
        for pool in (self._encoding, self._reading):
            pool.shutdown(wait=False)

    async def pieces(self, wanted: Wanted) -> AsyncGenerator[Any, None]:
        """First the `Answer` that a request gets, then what is written for it as it comes: lists of pieces. Ends when
        all choices have; where nobody goes on taking them, their rows are let go of.

        Raises:
            ApiError: the request is refused, or a choice cannot be written.
        """
        await asyncio.to_thread(self.entry, wanted.model)
        with self._taken(wanted) as places:
            loaded = await asyncio.shield(self._ready)
            job, inbox = await self._job(loaded, wanted, places)
            yield Answer(wanted, loaded.names, sum(len(order.ids) for order in job.orders[:: wanted.n]))
            worker, left = self.worker, wanted.choices
            assert worker is not None
            if self.state == "failed":
                raise ApiError(503, STOPPING, code="stopping")
            began: float | None = time.monotonic()
            worker.submit(job)
            try:
                while left:
                    found = [await inbox.get()]
                    while not inbox.empty():
                        found.append(inbox.get_nowait())
                    if began is not None:
                        self.counters.took("first_token_seconds", time.monotonic() - began)
                        began = None
                    for piece in found:
                        if piece.error is not None:
                            raise as_api_error(piece.error, wanted.model)
                        left -= piece.last
                    yield found
            finally:
                if left:
                    self.counters.count("abandoned_total", left)
                    worker.cancel(job)

    @contextlib.contextmanager
    def _taken(self, wanted: Wanted) -> Iterator[_Places]:
        """A place in the queue for each choice, until it is written, whenever its client takes it. Raises ApiError:
        there is none."""
        if self.state not in ("ok", "loading"):
            raise ApiError(503, STOPPING, code="stopping")
        if self.choices + wanted.choices > self.bounds.max_queue:
            self.counters.count("refused_total", reason="queue")
            raise ApiError(
                429, f"{self.choices:,} choices are being written or wait, and there is room for "
                f"{self.bounds.max_queue:,}; try again in a moment", code="queue_full", headers={"retry-after": "1"}
            )  # fmt: skip
        places = _Places(wanted.choices)
        self.choices += places.left
        try:
            yield places
        finally:
            self.choices -= places.left
            places.left = 0

    def entry(self, name: str) -> Entry:
        """The model of a name. Raises ApiError (404)."""
        found = self.catalogue.find(name)
        if found is None:
            names = self.catalogue.names(_COMPARED)
            shown = name if len(name) <= 100 else f"{name[:100]}..."
            raise ApiError(404, f"the model {shown!r} does not exist here{did_you_mean(name[:100], names)}; "
                           "GET /v1/models names those that do", param="model", code="model_not_found")  # fmt: skip
        return found

    async def _job(self, loaded: Loaded, wanted: Wanted, places: _Places) -> tuple[Job, asyncio.Queue[Piece]]:
        """The orders of a request, and where their pieces come in."""
        loop = asyncio.get_running_loop()
        entry, form = await loop.run_in_executor(self._reading, self._opened, loaded, wanted.model)
        prompts = await loop.run_in_executor(self._encoding, self._prompts.ids, loaded, wanted, form)
        self.counters.count("tokens_total", sum(map(len, prompts)), kind="prompt")
        inbox: asyncio.Queue[Piece] = asyncio.Queue()

        def deliver(piece: Piece) -> None:
            self.counters.count("tokens_total", piece.tokens, kind="completion")
            if piece.last and places.left:
                places.left -= 1
                self.choices -= 1
            inbox.put_nowait(piece)

        return Job(tuple(self._orders(loaded, wanted, entry, prompts)), deliver), inbox

    def _opened(self, loaded: Loaded, name: str) -> tuple[Entry, PromptForm]:
        """A model with its files read, and how its prompts are made. Raises ApiError."""
        entry = self.entry(name)
        try:
            if entry.delta is not None:
                loaded.prepare(entry.delta)
            return entry, self.catalogue.form(entry)
        except SpectuneError as error:
            raise as_api_error(error, name, of_model=True) from error

    def _orders(self, loaded: Loaded, wanted: Wanted, entry: Entry, prompts: list[tuple[int, ...]]) -> Iterator[Order]:
        from spectune.inference import Sampling

        drawing, sampling = wanted.drawing, None
        if drawing is not None:
            seed = secrets.randbits(62) if drawing.seed is None else drawing.seed
            sampling = Sampling(seed, drawing.temperature, drawing.top_p, drawing.top_k)
        for place, ids in enumerate(prompts):
            room = room_for(loaded, wanted, len(ids), self.bounds)
            for number in range(wanted.n):
                stream = place * wanted.n + number
                yield Order(
                    ids, entry.delta, room, sampling, stream, wanted.stops, wanted.logprobs, version=entry.version
                )


def as_api_error(error: BaseException, model: str, *, of_model: bool = False) -> ApiError:
    """An error of the model, a delta or the engine, as the client is told of it: nothing of the server's files.

    Args:
        of_model: it came up before the request was looked at.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, "out of memory; ask for fewer tokens, or try again later", code="out_of_memory")
    if isinstance(error, DoesNotFitError):
        log.warning("the model %r does not fit: %s", model, error)
        return ApiError(503, f"the model {model!r} does not fit into memory now", param="model", code="out_of_memory")
    if isinstance(error, DataError) or (of_model and isinstance(error, SpectuneError)):
        log.warning("the model %r cannot be served: %s", model, error)
        said = f"the model {model!r} cannot be served; the server's log says why"
        return ApiError(500, said, param="model", code="model_unusable")
    if isinstance(error, ConfigError):
        return invalid(str(error), code="invalid_request")
    log.error("a request for %r failed: %s", model, first_line(error), exc_info=error)
    return ApiError(500, "an error of the server; its log says more", code="internal_error")


def _looked_at(future: asyncio.Future[Any]) -> None:
    """An exception that nobody waited for is no news."""
    if not future.cancelled():
        future.exception()
