"""`spectune generate --input requests.jsonl --output answers.jsonl`: a file of requests, answered line by line."""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectune.cli.base_and_deltas import loader, what_is_asked
from spectune.cli.console import note
from spectune.data.requests import IDENTITY, Asked, How, requests, row_asked
from spectune.errors import DataError, InterruptedRun, SpectuneError, WriteError, first_line
from spectune.files.line_file import LineFile, line_file
from spectune.files.strict_json import strict_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spectune.data.asking import PromptForm
    from spectune.data.encoding import RowEncoder
    from spectune.inference import Engine, Ticket, Written
    from spectune.inference.written_text import WrittenText
    from spectune.serving.catalogue import Catalogue, Entry
    from spectune.serving.loaded import Loaded

#: how every line begins, and with it every file
BEGINS = b'{"line": '
#: answers that are done and wait for the line before them are no more than these, with those that are being written
AHEAD = 1024
#: seconds between two lines that say how far it is
TOLD_EVERY = 10.0
#: ways of making prompts that are kept; there may be thousands of deltas
_FORMS = 256


@dataclass(frozen=True)
class Batch:
    """What a user asks for.

    Attributes:
        deltas: a folder; None: rows may name runs' folders alone.
        usual: what holds where a row does not say.
        place: device, dtype, ...: arguments of `spectune.load`.
    """

    source: Path
    output: Path
    resume: bool
    run: Path | None
    model: str | None
    deltas: Path | None
    usual: How
    device_memory: int
    place: dict[str, Any]


def answered(batch: Batch) -> dict[str, Any]:
    """Answer all requests of a file. Returns what became of them: `lines`, `failed`, `resumed` and `tokens`.

    Raises:
        ConfigError, DataError: a flag is not what it has to be, a file is not there, or the base is not to be had.
        WriteError: the disk is full; all lines but the last are there.
        InterruptedRun: likewise.
    """
    with line_file(batch.output, resume=batch.resume, begins=BEGINS) as file:
        before = Before.of(file)
        asked = itertools.dropwhile(lambda one: one.number <= before.lines, _checked(batch, before))
        first = next(asked, None)
        if first is None:  # nothing is loaded for nothing
            return before.result(tokens=0)
        what = what_is_asked(batch.run, batch.model, batch.deltas)
        catalogue = what.catalogue(batch.deltas)
        loaded = loader(what.base, batch.place, None, batch.device_memory)()
        usual = next(iter(what.named), what.name)
        prompts = Prompts(catalogue, loaded.tokenizer, usual)
        writing = Writing(loaded, prompts, file, before)
        try:
            writing.all_of(map(prompts.whose, itertools.chain([first], asked)))
        except KeyboardInterrupt as error:
            raise InterruptedRun(f"{writing.lines:,} lines are in {batch.output}. Go on with: {_again()}") from error
        return writing.result()


@dataclass(frozen=True)
class Before:
    """What a file holds that is gone on in."""

    lines: int = 0
    failed: int = 0
    last: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, file: LineFile) -> Before:
        """Raises DataError: a line is none of this command's."""
        lines, failed, last = 0, 0, dict[str, Any]()
        for line in file.lines():
            lines += 1
            try:
                last = json.loads(line)
            except ValueError as error:
                raise _damaged(file.path, lines) from error
            if not isinstance(last, dict) or last.get("line") != lines:
                raise _damaged(file.path, lines)
            failed += "error" in last
        return cls(lines, failed, last)

    def result(self, *, tokens: int, lines: int | None = None, failed: int = 0) -> dict[str, Any]:
        whole = self.lines if lines is None else lines
        return {"lines": whole, "failed": self.failed + failed, "resumed": self.lines, "tokens": tokens}


def _damaged(path: Path, line: int) -> DataError:
    return DataError(
        f"{path}:{line} is not line {line} of this command's answers: the file was changed. Remove what is wrong there "
        "and all behind it, or choose another name"
    )


def _checked(batch: Batch, before: Before) -> Iterator[Asked]:
    """The requests. Raises DataError: those that are answered already are not these."""
    number = 0
    for one in requests(batch.source, batch.usual):
        number = one.number
        if number == before.lines and one.identity != before.last.get(IDENTITY):
            raise DataError(
                f"line {number} of {batch.output} answers {IDENTITY} {before.last.get(IDENTITY)!r}, and {one.origin} "
                f"has {one.identity!r}: --resume goes on with the same --input. Choose another --output for this one"
            )
        yield one
    if number < before.lines:
        raise DataError(
            f"{batch.output} has {before.lines:,} lines and {batch.source} {number:,} requests: --resume goes on with "
            "the same --input. Choose another --output for this one"
        )
    if number == 0:
        raise DataError(f"{batch.source} holds no request")


@dataclass(eq=False)
class _Row:
    """A request that is being written. `held`: what is given back when it ends."""

    asked: Asked
    text: WrittenText
    prompt_tokens: int
    held: contextlib.ExitStack
    tokens: int = 0


class Prompts:
    """Makes the prompt of each request as rows were made that its model was trained on.

    Args:
        usual: the model of requests that name none.
    """

    def __init__(self, catalogue: Catalogue, tokenizer: PreTrainedTokenizerBase, usual: str) -> None:
        self._catalogue, self._tokenizer, self._usual = catalogue, tokenizer, usual
        self._forms: dict[str, tuple[PromptForm, RowEncoder]] = {}

    def whose(self, asked: Asked) -> Asked:
        """The request with the delta that its `model` means, where it names none otherwise. Without a folder of deltas,
        what is not the name of one is a column of the row's own."""
        if asked.delta is not None or asked.model is None:
            return asked
        means = self._catalogue.deltas is not None or self._catalogue.find(asked.model) is not None
        return replace(asked, delta=asked.model) if means else asked

    def of(self, asked: Asked) -> tuple[str | None, list[int]]:
        """The delta's name in the bank, and the ids. Raises SpectuneError."""
        from spectune.data.asking import asked_ids

        name = asked.delta or self._usual
        entry = self._entry(name, named=asked.delta is not None)
        if name not in self._forms:
            if len(self._forms) >= _FORMS:
                self._forms.clear()
            form = self._catalogue.form(entry)
            self._forms[name] = form, form.encoder(self._tokenizer)
        form, encoder = self._forms[name]
        return entry.delta, asked_ids(row_asked(asked.record, form, self._tokenizer, asked.origin), encoder)

    def _entry(self, name: str, *, named: bool) -> Entry:
        from spectune.serving.catalogue import Entry, delta_in

        if (entry := self._catalogue.find(name)) is not None:
            return entry
        folder = delta_in(Path(name)) if named else None
        if folder is None:
            where = f" in {self._catalogue.deltas}" if self._catalogue.deltas is not None else ""
            raise DataError(f"no delta {name!r}{where}, and no folder of that name holds one")
        return Entry(name, str(folder.absolute()), 0)


class Writing:
    """Requests go into rows of the engine as they become free, and answers to the file in the order of requests.

    Args:
        before: lines that are there already.
    """

    def __init__(self, loaded: Loaded, prompts: Prompts, file: LineFile, before: Before) -> None:
        self._loaded, self._prompts, self._file, self._before = loaded, prompts, file, before
        self.lines, self.failed, self.tokens = before.lines, 0, 0
        self._done: dict[int, dict[str, Any]] = {}
        self._running: dict[Ticket, _Row] = {}
        self._began = self._told = time.monotonic()

    def all_of(self, asked: Iterator[Asked]) -> None:
        """Answer them all."""
        engine = self._loaded.engine()
        waiting: Asked | None = None
        ended = False
        try:
            while not ended or waiting is not None or self._running:
                while len(self._running) < engine.rows and len(self._running) + len(self._done) < AHEAD:
                    one = waiting or next(asked, None)
                    waiting = None
                    if one is None:
                        ended = True
                        break
                    if not self._begin(engine, one):
                        waiting = one  # until a row ends
                        break
                for written in engine.step() if self._running else ():
                    self._take(engine, written)
                self._put_down()
        finally:
            self._put_down()
            for row in self._running.values():
                row.held.close()
            engine.close()
        self._tell(last=True)

    def result(self) -> dict[str, Any]:
        return self._before.result(tokens=self.tokens, lines=self.lines, failed=self.failed)

    def _begin(self, engine: Engine, asked: Asked) -> bool:
        """Give a request a row. Returns whether it has one, or cannot be answered; False: its delta has no room yet."""
        from spectune.inference import Sampling
        from spectune.serving.orders import Order

        if asked.problem is not None:
            self._fail(asked, asked.problem)
            return True
        held, how = contextlib.ExitStack(), asked.how
        try:
            delta, ids = self._prompts.of(asked)
            drawn = Sampling(how.seed, how.temperature, how.top_p, how.top_k) if how.sampled else None
            order = Order(tuple(ids), delta, how.max_new_tokens, drawn, how.stream, how.stop)
            ticket = self._loaded.begin(engine, order, held)
        except WriteError:
            raise
        except SpectuneError as error:
            held.close()
            if self._loaded.is_full(error) and self._running:
                return False
            self._fail(asked, str(error).removeprefix(f"{asked.origin}: "))
            return True
        except BaseException:
            held.close()
            raise
        self._running[ticket] = _Row(asked, self._loaded.text(how.stop), len(ids), held)
        return True

    def _take(self, engine: Engine, written: Written) -> None:
        row = self._running.get(written.ticket)
        if row is None:
            return
        finished = written.finished
        if written.error is not None:
            del self._running[written.ticket]
            row.held.close()
            self._fail(row.asked, first_line(written.error))
            return
        if written.token is not None:
            row.tokens += 1
            row.text.add(written.token)
        if row.text.found and finished is None:
            engine.cancel(written.ticket)
            finished = "stop"
        if finished is None:
            return
        row.text.end()
        del self._running[written.ticket]
        row.held.close()
        self.tokens += row.tokens
        self._done[row.asked.number] = {
            **_known(row.asked), "completion": row.text.text,
            "finish_reason": "stop" if row.text.found else finished,
            "prompt_tokens": row.prompt_tokens, "completion_tokens": row.tokens,
        }  # fmt: skip

    def _fail(self, asked: Asked, reason: str) -> None:
        self._done[asked.number] = {**_known(asked), "error": reason}

    def _put_down(self) -> None:
        """Write the answers whose turn it is."""
        while (line := self._done.get(self.lines + 1)) is not None:
            self._file.write(strict_json(line, indent=None))
            self.lines += 1
            self.failed += "error" in line
            del self._done[self.lines]
        self._tell(last=False)

    def _tell(self, *, last: bool) -> None:
        now = time.monotonic()
        if not last and now - self._told < TOLD_EVERY:
            return
        self._told = now
        new, seconds = self.lines - self._before.lines, max(now - self._began, 1e-9)
        failed = f", {self.failed:,} failed" if self.failed else ""
        rates = f"{new / seconds:,.1f} answers and {self.tokens / seconds:,.0f} tokens a second"
        note(f"{self.lines:,} lines{failed}; {rates}")


def _known(asked: Asked) -> dict[str, Any]:
    """What a line says of its request."""
    known = {"line": asked.number, IDENTITY: asked.identity, "delta": asked.delta}
    return {key: value for key, value in known.items() if value is not None}


def _again() -> str:
    words = ["spectune", *sys.argv[1:]]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])
