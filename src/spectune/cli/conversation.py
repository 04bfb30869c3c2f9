"""A conversation with one model: what was said, and the next answer, piece by piece."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from spectune.cli.console import note
from spectune.data.asking import PromptForm, asked_ids
from spectune.errors import ConfigError
from spectune.inference import Sampling
from spectune.serving.orders import Order

if TYPE_CHECKING:
    from collections.abc import Generator

    from spectune.data import Row
    from spectune.data.requests import How
    from spectune.inference import Ticket
    from spectune.serving.loaded import Loaded


class Conversation:
    """Turns of a user and a model. Where the model was trained on prompts, each line is one by itself.

    Args:
        delta: its name in the bank; None is the base.
        form: how prompts are made.

    Attributes:
        turns: whether earlier turns stand before the next question.
        system: the system message; None: the run's own, or none.
    """

    def __init__(self, loaded: Loaded, delta: str | None, form: PromptForm) -> None:
        self._loaded, self._delta, self._form = loaded, delta, form
        self._encoder = form.encoder(loaded.tokenizer)
        self._engine = loaded.engine()
        self.turns = form.templated(loaded.tokenizer)
        self.system: str | None = None
        self._said: list[dict[str, Any]] = []
        self._answers, self._told = 0, False

    @property
    def kind(self) -> str:
        """What a line is, in words."""
        return "a conversation" if self.turns else "each line is a prompt by itself"

    def begin(self, system: str | None) -> None:
        """Forget what was said. Raises ConfigError: there is no place for a system message."""
        if system is not None and not self.turns:
            raise ConfigError("this model has no chat template, or was trained on prompts: no system message")
        self.system, self._said = system, []

    def answer(self, text: str, how: How) -> Generator[str, None, None]:
        """The answer to what the user says, in pieces as they are written. What was written when the generator is
        closed is what was said.

        Raises:
            ConfigError: the text leaves no room in the base's context, or cannot be said in this conversation.
        """
        asked = [*self._said, {"role": "user", "content": text}]
        asked, ids = self._fitting(asked, text, how.max_new_tokens)
        drawn = Sampling(how.seed, how.temperature, how.top_p, how.top_k) if how.sampled else None
        order = Order(tuple(ids), self._delta, how.max_new_tokens, drawn, self._answers, how.stop)
        self._answers += 1
        written = self._loaded.text(how.stop)
        with contextlib.ExitStack() as held:
            ticket = self._loaded.begin(self._engine, order, held)
            try:
                yield from self._pieces(ticket, written)
            finally:
                self._engine.cancel(ticket)
                if self.turns:
                    self._said = [*asked, {"role": "assistant", "content": written.text}]

    def _pieces(self, ticket: Ticket, written: Any) -> Iterator[str]:
        while ticket.finished is None:
            for one in self._engine.step():
                if one.error is not None:
                    raise one.error
                if one.token is not None and (piece := written.add(one.token)):
                    yield piece
        if last := written.end():
            yield last

    def _fitting(self, asked: list[dict[str, Any]], text: str, new: int) -> tuple[list[dict[str, Any]], list[int]]:
        """What is asked with its ids: without the earliest turns, where the base's context has no room for all and for
        an answer."""
        limit = self._loaded.context
        # a short context is not kept free for a long answer that may never come
        room = None if limit is None else limit - min(new, limit // 4)
        while True:
            ids = asked_ids(self._row(asked, text), self._encoder)
            if room is None or len(ids) <= room or len(asked) < 3:
                return asked, ids
            asked = asked[2:]
            note("(the conversation is longer than the base's context: its earliest turn is left out)")

    def _row(self, asked: list[dict[str, Any]], text: str) -> Row:
        if not self.turns:
            told, self._told = self._told, True
            return self._form.prompt(text, "each line", note if not told else lambda _: None)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self._form.chat([*system, *asked], self._loaded.tokenizer, "the conversation")

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self.close()
