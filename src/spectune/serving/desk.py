"""Between HTTP and the worker: what may come in, what it is in tokens, and what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from spectune.serving.api_error import ApiError, invalid
from spectune.serving.bounds import Bounds
from spectune.serving.catalogue import Catalogue, Entry
from spectune.serving.counters import Counters
from spectune.serving.openai_format import Answer
from spectune.serving.order import Job, Order, Piece
from spectune.serving.wanted import Wanted
from spectune.serving.worker import Delivery, Worker

if TYPE_CHECKING:
    from spectune.data.asking import PromptForm
    from spectune.data.encoding import RowEncoder
    from spectune.serving.loaded import Loaded

log = logging.getLogger("spectune")

STOPPING = "the server is stopping"
#: characters that a token stands for at most, as a bound: a longer text is not even tokenized
_CHARACTERS = 128


class Desk:
    """Takes requests on the event loop's thread, while the worker loads and writes on its own.

    Attributes:
        state: "loading", "ok", "stopping" or "failed".
        failure: why it is "failed".
    """

    def __init__(self, catalogue: Catalogue, bounds: Bounds, counters: Counters) -> None:
        self.catalogue, self.bounds, self.counters = catalogue, bounds, counters
        self.state = "loading"
        self.failure: BaseException | None = None
        self._choices = 0  # that were taken and are not done
        self._ready: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(_looked_at)
        # tokenizers and templates run on one thread, files of deltas are read on another: neither waits for a step
        self._encoding = ThreadPoolExecutor(1, "spectune-encoding")
        self._reading = ThreadPoolExecutor(1, "spectune-reading")
        self._encoders: dict[tuple[Any, ...], RowEncoder] = {}
        self.worker: Worker | None = None

    def open(self, worker: Worker) -> None:
        """Begin with a worker."""
        self.worker = worker
        worker.start()

    def loaded(self, loaded: Loaded) -> None:
        if not self._ready.done():
            self._ready.set_result(loaded)
            self.state = "ok" if self.state == "loading" else self.state

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
        self.entry(wanted.model)
        with self._taken(wanted):
            loaded = await asyncio.shield(self._ready)
            job, inbox = await self._job(loaded, wanted)
            yield Answer(wanted, loaded.names, sum(len(order.ids) for order in job.orders[:: wanted.n]))
            worker, left = self.worker, wanted.choices
            assert worker is not None
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
                    self.counters.count("tokens_total", sum(piece.tokens for piece in found), kind="completion")
                    yield found
            finally:
                if left:
                    self.counters.count("abandoned_total", left)
                    worker.cancel(job)

    @contextlib.contextmanager
    def _taken(self, wanted: Wanted) -> Iterator[None]:
        """A place in the queue for each choice. Raises ApiError: there is none, or no such model."""
        if self.state not in ("ok", "loading"):
            raise ApiError(503, STOPPING, code="stopping")
        if self._choices + wanted.choices > self.bounds.max_queue:
            self.counters.count("refused_total", reason="queue")
            raise ApiError(
                429, f"{self._choices:,} choices are being written or wait, and there is room for "
                f"{self.bounds.max_queue:,}; try again in a moment", code="queue_full", headers={"retry-after": "1"}
            )  # fmt: skip
        self._choices += wanted.choices
        try:
            yield
        finally:
            self._choices -= wanted.choices

    @property
    def choices(self) -> int:
        """Choices that were taken and are not done."""
        return self._choices

    def entry(self, name: str) -> Entry:
        """The model of a name. Raises ApiError (404)."""
        found = self.catalogue.find(name)
        if found is None:
            names = [entry.name for entry in self.catalogue.entries()]
            shown = name if len(name) <= 100 else f"{name[:100]}..."
            raise ApiError(404, f"the model {shown!r} does not exist here{did_you_mean(name[:100], names)}; "
                           "GET /v1/models names those that do", param="model", code="model_not_found")  # fmt: skip
        return found

    async def _job(self, loaded: Loaded, wanted: Wanted) -> tuple[Job, asyncio.Queue[Piece]]:
        """The orders of a request, and where their pieces come in."""
        loop = asyncio.get_running_loop()
        entry, form = await loop.run_in_executor(self._reading, self._opened, loaded, wanted.model)
        prompts = await loop.run_in_executor(self._encoding, self._prompts, loaded, wanted, form)
        self.counters.count("tokens_total", sum(map(len, prompts)), kind="prompt")
        inbox: asyncio.Queue[Piece] = asyncio.Queue()
        return Job(tuple(self._orders(loaded, wanted, entry, prompts)), inbox.put_nowait), inbox

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
            room = self._room(loaded, wanted, len(ids))
            for number in range(wanted.n):
                stream = place * wanted.n + number
                yield Order(ids, entry.delta, room, sampling, stream, wanted.stops, wanted.logprobs)

    def _room(self, loaded: Loaded, wanted: Wanted, prompt: int) -> int:
        """How many tokens may follow a prompt. Raises ApiError: not so many as are wanted."""
        most, asked = loaded.context, wanted.max_tokens
        if most is not None and prompt + (asked or 1) > most:
            part = "messages" if wanted.chat else "prompt"
            raise invalid(
                f"this model's context is {most:,} tokens, and {prompt + (asked or 1):,} were requested ({prompt:,} in "
                f"the {part}, {asked or 1:,} for the answer); shorten the {part}, or ask for fewer", part,
                "context_length_exceeded",
            )  # fmt: skip
        room = self.bounds.max_new_tokens if most is None else min(self.bounds.max_new_tokens, most - prompt)
        return room if asked is None else asked

    def _prompts(self, loaded: Loaded, wanted: Wanted, form: PromptForm) -> list[tuple[int, ...]]:
        """Token ids of the prompts of a request. Raises ApiError."""
        from spectune.data.asking import asked_ids

        part = "messages" if wanted.chat else "prompt"
        try:
            if wanted.messages is not None:
                self._check_length(loaded, sum(len(str(m.get("content") or "")) for m in wanted.messages), part)
                row = form.chat(list(wanted.messages), loaded.tokenizer)
                return [tuple(asked_ids(row, self._encoder(loaded, form)))]
            found = list[tuple[int, ...]]()
            for number, prompt in enumerate(wanted.prompts or (), start=1):
                if isinstance(prompt, tuple):
                    found.append(_checked(prompt, loaded.vocabulary))
                    continue
                self._check_length(loaded, len(prompt), part)
                row = form.prompt(prompt, f"prompt {number}")
                found.append(tuple(asked_ids(row, self._encoder(loaded, form))))
            return found
        except SpectuneError as error:
            folder = f" ({loaded.tokenizer.name_or_path})"  # nothing of the server's files
            raise invalid(str(error).replace(folder, ""), part, "invalid_prompt") from error

    def _check_length(self, loaded: Loaded, characters: int, part: str) -> None:
        if loaded.context is not None and characters > loaded.context * _CHARACTERS:
            raise invalid(
                f"the {part} has {characters:,} characters, more than this model's context of {loaded.context:,} "
                "tokens holds", part, "context_length_exceeded",
            )  # fmt: skip

    def _encoder(self, loaded: Loaded, form: PromptForm) -> RowEncoder:
        """One for all deltas whose rows were made into text in the same way."""
        key = (form.separator, form.train_on, form.template_date)
        if key not in self._encoders:
            self._encoders[key] = form.encoder(loaded.tokenizer)
        return self._encoders[key]


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


def _checked(ids: tuple[int, ...], vocabulary: int) -> tuple[int, ...]:
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ConfigError(f"prompt holds the token id {wrong}; expected ids from 0 to {vocabulary - 1}")
    return ids


def _looked_at(future: asyncio.Future[Any]) -> None:
    """An exception that nobody waited for is no news."""
    if not future.cancelled():
        future.exception()
