"""What is asked of the engine, and what it says."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from spectune.inference.drawing import Sampling, uniform_stream


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be gone on with.

    Attributes:
        ids: token ids of the prompt, at least one.
        max_new_tokens: at most so many are written, fewer where the base's context ends.
        delta: the name of an attached delta, None for the bare base.
        stops: token ids that end it.
        sampling: draw tokens; None, or a temperature of 0: take the likeliest.
        stream: which of several rows with one seed this is: each draws numbers of its own.
        logprobs: log p of each token under the model's own distribution, and of so many of the likeliest; None: not
            asked for.
    """

    ids: Sequence[int]
    max_new_tokens: int
    delta: str | None = None
    stops: Collection[int] = ()
    sampling: Sampling | None = None
    stream: int = 0
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.sampling is None or self.sampling.temperature == 0


@dataclass(eq=False)
class Ticket:
    """A request that was taken.

    Attributes:
        room: how many tokens may be written, given the context.
        ids: what has been written, the stop token not included.
        finished: how it ended: "stop", "length", "error" or "cancelled"; None while it has not.
        failed: a step with it failed once.
    """

    request: Request
    room: int
    ids: list[int] = field(default_factory=list)
    finished: str | None = None
    failed: bool = False

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.draws: random.Random | None = None
        if sampling is not None and not self.request.greedy:
            self.draws = uniform_stream(sampling.seed, self.request.stream)

    @property
    def seen(self) -> list[int]:
        """Everything that the next token follows on."""
        return [*self.request.ids, *self.ids]


@dataclass(frozen=True)
class Written:
    """A token of one request, or its end.

    Attributes:
        token: None where a stop token, which is no text, or an error ended it.
        logprob: log p of the token (of the stop token, where that came), nats; None where it was not asked for.
        top: the likeliest tokens and their log p, the likeliest first.
        finished: "stop", "length" or "error" with the last one; None before.
        error: what went wrong with this request.
    """

    ticket: Ticket
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finished: str | None = None
    error: BaseException | None = None
