"""Rows that ask for an answer: a row of any shape, with or without one, whose it is, and how it is to be written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectune.data.asking import PromptForm, asked_row
from spectune.data.chats.conversations import kind_of
from spectune.data.problem import RowProblem
from spectune.data.reading import Bad, records
from spectune.data.shapes import Row
from spectune.errors import ConfigError

#: keys that say how a row is answered; all others are the row's
DELTA, IDENTITY = "delta", "id"
#: OpenAI's word for whose answer is wanted, and a column of many a dataset: whose answer it was
MODEL = "model"
#: OpenAI's names of others
_ALSO = {"max_completion_tokens": "max_new_tokens", "max_tokens": "max_new_tokens"}
_STOPS, _LONGEST_STOP = 16, 500
_SEEDS = 2**63


@dataclass(frozen=True)
class How:
    """How an answer is written.

    Attributes:
        temperature: 0 takes the likeliest token.
        stop: texts that end it; they are not part of it.
        stream: which of several answers with one seed this is: each is drawn by itself.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stream: int = 0

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> How:
        """Of a command's flags; sampling is for `do_sample` alone."""
        plain = cls(flags["max_new_tokens"])
        if not flags["do_sample"]:
            return plain
        drawn = {"temperature": flags["temperature"], "top_p": flags["top_p"], "seed": flags["seed"] or 0}
        return dataclasses.replace(plain, **drawn)

    @property
    def sampled(self) -> bool:
        return self.temperature > 0


@dataclass(frozen=True)
class Asked:
    """A request of a file.

    Attributes:
        number: its place in the file, from 1.
        record: what it holds beside the keys that say how.
        delta: the name that it gives; None where it gives none.
        model: its `model`, which may mean the same.
        identity: its `id`, as it is.
        problem: why it cannot be answered; None where nothing is known against it.
    """

    number: int
    origin: str
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    delta: str | None = None
    how: How = How()
    identity: Any = None
    problem: str | None = None
    model: str | None = None


def requests(source: Path, usual: How) -> Iterator[Asked]:
    """The requests of a file of any kind that rows may be in, one after the other, in bounded memory.

    Args:
        usual: what holds where a request does not say.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    for number, (origin, record) in enumerate(records(str(source)), start=1):
        if isinstance(record, Bad):
            yield Asked(number, origin, problem=str(record))
            continue
        identity = _identity(record)
        try:
            delta, how, rest = _taken(record, usual)
        except RowProblem as problem:
            yield Asked(number, origin, identity=identity, problem=str(problem))
        else:
            own = record.get("seed") is not None
            how = dataclasses.replace(how, stream=0 if own else number)
            model = record.get(MODEL)
            yield Asked(
                number, origin, rest, delta, how, identity, model=model if isinstance(model, str) and model else None
            )


def row_asked(record: Mapping[str, Any], form: PromptForm, tokenizer: Any, origin: str = "the request") -> Row:
    """A request's row, as the model was trained on such rows: one with an answer is taken as it is, and its answer
    left out; one without is put into the form as what a user types is.

    Raises:
        ConfigError: it is no row.
    """
    given = {key: value for key, value in record.items() if value is not None}
    messages = given.get("messages")
    if isinstance(messages, list | tuple) and not _answered(messages) and not {"tools", "documents"} & given.keys():
        return form.chat(list(messages), tokenizer, origin)
    if "prompt" in given and "completion" not in given:
        prompt = given["prompt"]
        if isinstance(prompt, list | tuple):
            return form.chat(list(prompt), tokenizer, origin)
        if not isinstance(prompt, str):
            raise ConfigError(f"{origin}: prompt is {kind_of(prompt)}, expected text")
        if not {"history", "system"} & given.keys():
            return form.prompt(prompt, origin)
        given["completion"] = ""
    if "instruction" in given and "output" not in given:
        return dataclasses.replace(asked_row(origin, {**given, "output": "-"}), completion="")
    return asked_row(origin, given)


def _answered(messages: Any) -> bool:
    last = messages[-1] if messages else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def _identity(record: Mapping[str, Any]) -> Any:
    found = record.get(IDENTITY)
    return found if isinstance(found, str | int | float | bool) else None


def _taken(record: Mapping[str, Any], usual: How) -> tuple[str | None, How, dict[str, Any]]:
    """The delta, how it is answered, and what is left. Raises RowProblem."""
    said = {key: record[key] for key in _READ if record.get(key) is not None}
    found = {_ALSO.get(key, key): _READ[key](key, value) for key, value in said.items()}
    delta = found.pop(DELTA, None)
    drawn = found.pop("do_sample", None)
    how = dataclasses.replace(usual, **found)
    if drawn is False:
        how = dataclasses.replace(how, temperature=0.0)
    elif "temperature" not in found and (drawn or found.keys() & {"top_p", "top_k", "seed"}):
        how = dataclasses.replace(how, temperature=usual.temperature or 1.0)
    rest = {key: value for key, value in record.items() if key not in _READ and key != IDENTITY}
    return delta, how, rest


def _name(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RowProblem(f"{key} is {kind_of(value)}, expected the name of a delta")
    return value


def _number(least: float, most: float) -> Callable[[str, Any], float]:
    def read(key: str, value: Any) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not least <= value <= most:
            raise RowProblem(f"{key} is {value!r:.60}, expected a number from {least:g} to {most:g}")
        return float(value)

    return read


def _whole(least: int, most: int) -> Callable[[str, Any], int]:
    def read(key: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise RowProblem(f"{key} is {value!r:.60}, expected a whole number from {least:,} to {most:,}")
        return value

    return read


def _switch(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RowProblem(f"{key} is {value!r:.60}, expected true or false")
    return value


def _texts(key: str, value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    good = isinstance(given, list | tuple) and len(given) <= _STOPS
    if not good or not all(isinstance(text, str) and 0 < len(text) <= _LONGEST_STOP for text in given):
        raise RowProblem(f"{key} is {value!r:.60}, expected a text, or a list of at most {_STOPS}, none of them empty")
    return tuple(given)


_LENGTH = _whole(1, 2**20)
#: of two names of one thing the later one counts
_READ: Mapping[str, Callable[[str, Any], Any]] = {
    DELTA: _name, **dict.fromkeys(_ALSO, _LENGTH), "max_new_tokens": _LENGTH,
    "temperature": _number(0.0, 100.0), "top_p": _number(0.01, 1.0),
    "top_k": _whole(0, 2**31), "seed": _whole(-_SEEDS, _SEEDS - 1), "do_sample": _switch, "stop": _texts,
}  # fmt: skip
