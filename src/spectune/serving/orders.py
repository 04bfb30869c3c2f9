"""What passes between the HTTP side and the thread that writes: orders one way, pieces the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spectune.inference import Sampling


@dataclass(frozen=True)
class Order:
    """One choice to write.

    Attributes:
        delta: its name in the bank; None for the bare base.
        stream: which of several choices with one seed it is.
        stops: texts that end it.
        logprobs: see `spectune.inference.Request`.
        version: of the delta's files, as the prompt was made for it; None: whatever is there.
    """

    ids: tuple[int, ...]
    delta: str | None
    max_new_tokens: int
    sampling: Sampling | None = None
    stream: int = 0
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    version: int | None = None


@dataclass(frozen=True)
class Score:
    """A token that was written, and how likely it and others were there.

    Attributes:
        start: the place of its text among all that was written, in characters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    start: int


@dataclass(frozen=True)
class Piece:
    """What is new of a choice.

    Attributes:
        choice: its place in the request.
        text: whole characters; may be empty.
        tokens: how many it took.
        finished: "stop" or "length" with the last piece; None before.
        error: it ends here, and why.
    """

    choice: int
    text: str = ""
    tokens: int = 0
    scores: tuple[Score, ...] = ()
    finished: str | None = None
    error: BaseException | None = None

    @property
    def last(self) -> bool:
        return self.finished is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """The choices of one request.

    Attributes:
        deliver: takes its pieces; called on the HTTP side's thread.
        cancelled: nobody waits for it any more.
    """

    orders: tuple[Order, ...]
    deliver: Callable[[Piece], None]
    cancelled: bool = field(default=False, compare=False)
