"""The model that is served, with what its orders need."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spectune.errors import BankFullError, ConfigError, SpectuneError, first_line, is_out_of_memory
from spectune.serving.openai_format import TokenNames
from spectune.serving.orders import Order

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectune.inference import Engine, Ticket
    from spectune.inference.written_text import WrittenText

log = logging.getLogger("spectune")

#: rows that are written at once where nobody says
ROWS = {"cpu": 16}
ROWS_ELSEWHERE = 64
#: decoding steps of a server: what takes long once to be faster ever after is worth its time
_NO_END = 1_000_000_000


@dataclass(frozen=True)
class Loaded:
    """A base, and the bank of its deltas.

    Attributes:
        bank: a `spectune.Bank`; None where no delta is served.
        rows: written at once; None: as many as the device is usually good for.
        stops: ids that end a text.
        context: most tokens of prompt and answer together; None where nothing limits them.
        vocabulary: rows of the embedding.
        pad_token_id: fills places without a token.
        warm: names in the bank of deltas whose decoding steps are made before the first request, beside the base's; the
            first one by itself too. None: steps are made as requests come.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bank: Any
    rows: int | None
    stops: tuple[int, ...]
    context: int | None
    vocabulary: int
    pad_token_id: int
    names: TokenNames
    warm: tuple[str, ...] | None = None
    _versions: dict[str, int] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bank: Any = None, rows: int | None = None,
        warm: Sequence[str] | None = None,
    ) -> Loaded:  # fmt: skip
        from spectune.data import pad_token_id
        from spectune.families import vocabulary_rows
        from spectune.inference import context_length, stop_ids

        vocabulary = vocabulary_rows(model)
        return cls(
            model, tokenizer, bank, rows, tuple(stop_ids(model, tokenizer)), context_length(model), vocabulary,
            pad_token_id(tokenizer, vocabulary), TokenNames(tokenizer), None if warm is None else tuple(warm),
        )  # fmt: skip

    def engine(self) -> Engine:
        """What writes."""
        from spectune.inference import Engine, warm_up
        from spectune.planning.device_memory import free_memory

        rows = self.rows or ROWS.get(self.model.device.type, ROWS_ELSEWHERE)
        if self.warm is not None:
            engine = Engine(self.model, rows=rows, pad_token_id=self.pad_token_id, expected_steps=_NO_END)
            try:
                with contextlib.ExitStack() as held:
                    # half of what deltas may take is left for their weights
                    tables = None if self.bank is None else self.bank.device_memory // 2
                    warm_up(engine, self._warmed(held), free_memory(self.model.device.type), tables)
                return engine
            except Exception as error:
                if not isinstance(error, SpectuneError) and not is_out_of_memory(error):
                    raise
                log.warning("decoding steps are made as requests come: %s", first_line(error))
                engine.close()
        # nobody is to wait for a compiler in the middle of an answer
        return Engine(self.model, rows=rows, pad_token_id=self.pad_token_id)

    def _warmed(self, held: contextlib.ExitStack) -> list[str]:
        """Those of `warm` that can be had together, as the model has them."""
        found: list[str] = []
        for name in self.warm or ():
            try:
                found += held.enter_context(self.bank.hold([name]))
            except SpectuneError as error:  # whoever asks for it is told
                log.warning("no decoding steps are made for %s: %s", name, first_line(error))
        return found

    def text(self, stops: Sequence[str]) -> WrittenText:
        from spectune.inference.written_text import WrittenText

        return WrittenText(self.tokenizer, stops)

    def begin(self, engine: Engine, order: Order, held: contextlib.ExitStack) -> Ticket:
        """Give an order a row. What it needs is held until the stack is closed. Raises SpectuneError: its delta cannot
        be had, or its prompt leaves no room."""
        from spectune.inference import Request

        name = order.delta
        if name is not None:
            if order.version is not None:
                self._renew(name, order.version)
            (name,) = held.enter_context(self.bank.hold([name]))
        request = Request(
            order.ids, order.max_new_tokens, name, self.stops, order.sampling, order.stream, order.logprobs
        )
        return engine.submit(request)

    def _renew(self, delta: str, version: int) -> None:
        """Let go of weights whose files were written over since they were read. Raises BankFullError: rows of theirs
        are still being written."""
        if self._versions.setdefault(delta, version) != version:
            try:
                self.bank.forget(delta)
            except ConfigError as error:
                raise BankFullError(f"{error}; its files were written over") from error
            self._versions[delta] = version

    def is_full(self, error: BaseException) -> bool:
        """Whether a delta is refused for what others hold just now: room, or what it was before."""
        return isinstance(error, BankFullError)

    def prepare(self, delta: str) -> None:
        """Read a delta's files, from any thread. Raises SpectuneError."""
        self.bank.prepare(delta)
