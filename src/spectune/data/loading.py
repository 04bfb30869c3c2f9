"""Rows: the shapes that data may have, checked, with every bad row named at once.

Shapes: `text`; `prompt` + `completion`; `messages`; alpaca (`instruction`, `input`, `output`) and sharegpt
(`conversations`) are converted. Optional: `references` (a list), `label` with `choices`.
"""

import difflib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spectune.data.sources import Bad, records
from spectune.errors import DataError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_KEYS = ("text", "prompt", "completion", "messages", "instruction", "output", "conversations")
_EXPECTED = "expected text, prompt + completion, messages, instruction + output (alpaca), or conversations (sharegpt)"
#: the default share of the rows that is held out for validation
HELD_OUT = 0.1
_LISTED = 50
#: lists and objects within each other: what is deeper is no row, and would end in Python's own recursion limit
_DEEPEST = 100


class _ProblemError(Exception):
    """What is wrong with one row, and what was expected."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `text`, `prompt` with `completion`, or `messages` is set; `columns` holds what is left."""

    origin: str
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    references: tuple[str, ...] = ()
    label: str | None = None
    choices: tuple[str, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        """Whether a chat ends with the assistant's answer."""
        return bool(self.messages) and self.messages[-1].get("role") == "assistant"  # type: ignore[index]

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The messages of a chat before its answer."""
        return (self.messages or [])[: -1 if self.answered else None]


class Rows(list[Row]):
    """Rows, and what was left out under `--skip-bad-rows`."""

    def __init__(self, rows: list[Row], skipped: list[str]) -> None:
        super().__init__(rows)
        self.skipped = skipped


def load_rows(source: Any, *, skip_bad_rows: bool = False) -> Rows:
    """The rows of a file, a list of dicts, a list of `Row`, a `datasets.Dataset` or a hub data set (`name:split`).

    Args:
        skip_bad_rows: leave bad rows out; they are counted in the result's `skipped` and in the data report.

    Raises:
        DataError: the source cannot be read or is empty, or (all at once, `file:line` each) rows are bad.
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, list) and source and all(isinstance(row, Row) for row in source):
        return Rows(source, [])
    rows: list[Row] = []
    problems: list[str] = []
    for origin, record in records(source):
        try:
            if isinstance(record, Bad):
                raise _ProblemError(record)
            rows.append(_row(origin, record))
        except _ProblemError as problem:
            problems.append(f"{origin}: {problem}")
    named = source if isinstance(source, str) or hasattr(source, "__fspath__") else "the data"
    if problems and not skip_bad_rows:
        more = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise DataError(
            f"{named}: {len(problems)} bad of {len(rows) + len(problems)} rows. Mend them, or leave them out with "
            "--skip-bad-rows (they are counted in the report).",
            problems[:_LISTED] + more,
        )
    if not rows:
        raise DataError(f"{named}: no rows; {_EXPECTED} in each")
    return Rows(rows, problems)


def split_rows(rows: list[Row], share: float = HELD_OUT, seed: int = 0) -> tuple[Rows, Rows]:
    """`(train, valid)`: a seeded `share` of the rows (at least one) held out; both keep the order of the rows. Raises
    DataError: fewer than two rows."""
    if len(rows) < 2:
        raise DataError(f"{len(rows)} row cannot be split into training and validation; give at least 2, or --valid")
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    held = set(random.Random(seed).sample(range(len(rows)), count))
    train, valid = ([row for i, row in enumerate(rows) if (i in held) is out] for out in (False, True))
    return Rows(train, rows.skipped if isinstance(rows, Rows) else []), Rows(valid, [])


def unencodable(text: str) -> str | None:
    """What in a text is no Unicode text, so that no tokenizer takes it, as an escape: `'\\ud83d'`; else None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return ascii(text[error.start])
    return None


def _row(origin: str, given: Mapping[str, Any]) -> Row:
    _check_text(given)
    # a null is an absent key everywhere: `datasets` and Parquet fill what a row lacks with it
    record = {key: value for key, value in given.items() if value is not None}
    optional: dict[str, Any] = {
        "references": _strings(record, "references"),
        "label": _string(record, "label") if "label" in record else None,
        "choices": _strings(record, "choices"),
    }
    if optional["choices"] and optional["label"] is not None and optional["label"] not in optional["choices"]:
        raise _ProblemError(f"label {optional['label']!r} is not among its choices {list(optional['choices'])}")
    used: set[str] = set()
    fields: dict[str, Any]
    if "prompt" in record and "completion" in record:
        fields = {"prompt": _string(record, "prompt", empty=True), "completion": _string(record, "completion")}
    elif "messages" in record:
        fields = {"messages": _messages(record["messages"], "messages", "role", "content")}
    elif "conversations" in record:
        fields = {"messages": _messages(record["conversations"], "conversations", "from", "value")}
        used = {"conversations"}
    elif "instruction" in record and "output" in record:
        fields, used = _alpaca(record), {"instruction", "input", "output"}
    elif "text" in record:
        fields = {"text": _string(record, "text")}
    else:
        raise _ProblemError(_missing(given))
    columns = {key: value for key, value in record.items() if key not in {*used, *fields, *optional}}
    return Row(origin, **fields, **optional, columns=columns)


def _check_text(record: Mapping[str, Any]) -> None:
    """Raises _ProblemError for text that is none (half a surrogate pair), and for what is nested too deeply."""
    # not by recursion: what this refuses is what recursion would fail on
    waiting = [(str(key), part, 1) for key, value in record.items() for part in (key, value)]
    while waiting:
        key, value, depth = waiting.pop()
        if isinstance(value, str):
            if (wrong := unencodable(value)) is not None:
                raise _ProblemError(f"{ascii(key)[1:-1]} holds {wrong}, half a character; expected Unicode text")
        elif isinstance(value, Mapping | list | tuple):
            if depth > _DEEPEST:
                raise _ProblemError(f"{key} is nested more than {_DEEPEST} levels deep; expected text or a flat list")
            parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            waiting.extend((key, part, depth + 1) for part in parts)


def _alpaca(record: Mapping[str, Any]) -> dict[str, Any]:
    instruction, extra = _string(record, "instruction"), record.get("input") or ""
    if not isinstance(extra, str):
        raise _ProblemError(f"input is {type(extra).__name__}, expected text")
    paired = ", paired with an input that provides further context" if extra else ""
    context = f"\n\n### Input:\n{extra}" if extra else ""
    prompt = (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{instruction}{context}\n\n### Response:\n"
    )
    return {"prompt": prompt, "completion": _string(record, "output")}


def _messages(value: Any, key: str, role_key: str, text_key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise _ProblemError(f"{key} is {_kind(value)}, expected a list of messages")
    found = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get(text_key), str):
            raise _ProblemError(
                f"{key}[{number}] is {_kind(message)}, expected {{{role_key!r}: ..., {text_key!r}: text}}"
            )
        role = message.get(role_key)
        if key == "conversations":
            if role not in _ROLES:
                raise _ProblemError(f"{key}[{number}] comes from {role!r}, expected one of {', '.join(_ROLES)}")
            role = _ROLES[role]
        elif not isinstance(role, str):
            raise _ProblemError(f"{key}[{number}] has no role; expected system, user or assistant")
        more = {name: part for name, part in message.items() if part is not None} if key == "messages" else {}
        found.append({**more, "role": role, "content": message[text_key]})
    if found[-1]["role"] != "assistant":
        raise _ProblemError(
            f"{key} ends with {found[-1]['role']!r}; expected an assistant message, which is what is learned"
        )
    if not found[-1]["content"]:
        raise _ProblemError(f"the last message of {key} is empty; expected text to learn")
    return found


def _string(record: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise _ProblemError(f"{key} is {_kind(value)}, expected text")
    if not empty and not value.strip():
        raise _ProblemError(f"{key} is empty; expected text")
    return value


def _strings(record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = record.get(key)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise _ProblemError(f"{key} is {_kind(value)}, expected a list of texts")
    return tuple(value)


def _missing(record: Mapping[str, Any]) -> str:
    keys = [str(key) for key in record]
    partner = {"prompt": "completion", "completion": "prompt", "instruction": "output", "output": "instruction"}
    for key, other in partner.items():
        if record.get(key) is not None:
            if other in record:
                return f"{other} is null; expected text"
            near = difflib.get_close_matches(other, keys, n=1, cutoff=0.6)
            return f"{key} without {other}" + (f" (is {near[0]!r} meant?)" if near else "") + f"; {_EXPECTED}"
    if nulls := [key for key in keys if key in _KEYS and record[key] is None]:
        return f"{nulls[0]} is null; {_EXPECTED}"
    alike = [(k, m[0]) for k in keys if (m := difflib.get_close_matches(k, _KEYS, n=1, cutoff=0.7))]
    hint = f" (did you mean {alike[0][1]!r} for {alike[0][0]!r}?)" if alike else ""
    return f"has {', '.join(keys) or 'no keys'}{hint}; {_EXPECTED}"


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
