"""The shapes that a row may have, and one record as a row.

Shapes: `text`; `prompt` + `completion`; `messages`; sharegpt (`conversations`) and alpaca (`instruction`, `input`,
`output`); `tokens` + `tags`. Optional: `references` (a list), `label` with `choices`, or, for a head, `label` with a
text or a chat; beside chats `system`, `tools`, `documents` and `chat_template_kwargs`.
"""

import dataclasses
import datetime
import decimal
import difflib
import itertools
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spectune.data.chats.conversations import conversation, json_value, kind_of
from spectune.data.problem import RowProblem
from spectune.data.reading.limits import COLUMNS
from spectune.data.reading.raw_records import SHAPES

EXPECTED = (
    "expected text, prompt + completion, messages, instruction + output (alpaca), conversations (sharegpt), or, for a "
    "head, text + label or tokens + tags"
)
#: lists and objects within each other: what is deeper is no row, and would end in Python's own recursion limit
_DEEPEST = 100
#: keys of a row that a message names, and characters of each
_NAMED, _LONGEST_NAME = 30, 80
#: what a chat template is shown: it could call the methods of anything else
_SHOWN = frozenset({"messages", "conversations", "prompt", "completion", "tools", "documents", "chat_template_kwargs"})
_PLAIN = frozenset({int, float, bool, type(None)})
_OTHERS = (int, float, bytes, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)
_PREAMBLE = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
)
_PAIRED = ", paired with an input that provides further context"


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `text`, `prompt` with `completion`, `messages`, or `tokens` with `tags` is set; `columns` holds what is
    left.

    Attributes:
        label: of a row with choices the right one; of a text or a chat its class, or a number.
        shape: the keys that it was read from: text, prompt, messages, sharegpt, alpaca or tokens.
        history: of alpaca, earlier turns: what stands before each answer, and the answer.
        unlearned: places in `messages` of assistant turns that are not learned (`weight: 0`, `train: false`).
        tools, documents, template_kwargs: what the chat template gets beside the messages.
        source: the name of the data file, where there are several.
        tokens, tags: words, and the class of each.
    """

    origin: str
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    references: tuple[str, ...] = ()
    label: str | int | float | None = None
    choices: tuple[str, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)
    shape: str = field(default="", compare=False)
    history: tuple[tuple[str, str], ...] = ()
    unlearned: tuple[int, ...] = ()
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None
    source: str | None = None
    tokens: tuple[str, ...] | None = None
    tags: tuple[str | int, ...] | None = None

    @property
    def answered(self) -> bool:
        """Whether a chat ends with the assistant's answer."""
        return bool(self.messages) and self.messages[-1].get("role") == "assistant"  # type: ignore[index]

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The messages of a chat before its answer."""
        return (self.messages or [])[: -1 if self.answered else None]

    @property
    def before(self) -> str:
        """All text before the completion, earlier turns included, without a separator."""
        return "".join(f"{asked}{answer}\n\n" for asked, answer in self.history) + (self.prompt or "")

    def answered_with(self, answer: str) -> "Row":
        """The row as a training row with another answer; of a chat the last one alone is learned."""
        if self.messages is None:
            return dataclasses.replace(self, completion=answer)
        earlier = tuple(i for i, message in enumerate(self.asked) if message["role"] == "assistant")
        messages = [*self.asked, {"role": "assistant", "content": answer}]
        return dataclasses.replace(self, messages=messages, unlearned=earlier)


def row_of(origin: str, given: Mapping[str, Any], preferred: Sequence[str] = ()) -> Row:
    """One record as a row.

    Args:
        given: the record; a null is an absent key (`datasets` and Parquet fill what a row lacks with it).
        preferred: keys whose shape is taken where a record has several.

    Raises:
        RowProblem: it has no shape, or something in it is not what it has to be.
    """
    if len(given) > COLUMNS:
        raise RowProblem(f"has {len(given):,} keys; expected at most {COLUMNS:,}")
    _check_text(given)
    record = {key: value for key, value in given.items() if value is not None}
    shapes = [shape for shape in _READERS if all(key in record for key in shape[0])]
    if not shapes:
        raise RowProblem(_missing(given))
    keys, read, name = next((s for s in shapes if any(key in preferred for key in s[0])), shapes[0])
    fields, used = read(record)
    optional: dict[str, Any] = {
        "references": _strings(record, "references"),
        "label": _label(record, name) if "label" in record else None,
        "choices": _strings(record, "choices"),
    }
    if optional["choices"] and optional["label"] is not None and optional["label"] not in optional["choices"]:
        raise RowProblem(f"label {optional['label']!r} is not among its choices {list(optional['choices'])}")
    columns = {key: value for key, value in record.items() if key not in {*keys, *used, *optional}}
    return Row(origin, **fields, **optional, columns=columns, shape=name)


def _prompt(record: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    if isinstance(record["prompt"], list | tuple) and isinstance(record["completion"], list | tuple):
        asked, answers = record["prompt"], record["completion"]
        fields, used = _chat({**record, "messages": [*asked, *answers]})
        before = len(fields["messages"]) - len(answers)  # a system column may have become one more
        given = {i for i, message in enumerate(fields["messages"][:before]) if message["role"] == "assistant"}
        return fields | {"unlearned": tuple(sorted({*given, *fields["unlearned"]}))}, used
    fields = {"prompt": string(record, "prompt", empty=True), "completion": string(record, "completion")}
    return fields, set()


def _text(record: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    return {"text": string(record, "text")}, set()


def _label(record: Mapping[str, Any], shape: str) -> str | int | float:
    """Text; beside a text or a chat without choices also a number. Raises RowProblem: it is something else."""
    value = record["label"]
    if isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, int | float) or shape not in ("text", "messages", "sharegpt") or record.get("choices"):
        return string(record, "label")
    if not math.isfinite(value):
        raise RowProblem(f"label is {value}; expected a finite number")
    return value


def _tokens(record: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Words and their tags, lists or JSON texts of lists."""
    found = {key: json_value(record[key], key) for key in ("tokens", "tags")}
    for key, what in (("tokens", "words"), ("tags", "texts, or of whole numbers")):
        if not isinstance(found[key], list | tuple):
            raise RowProblem(f"{key} is {kind_of(found[key])}, expected a list of {what}")
    tokens, tags = found["tokens"], found["tags"]
    if not tokens:
        raise RowProblem("tokens is empty; expected at least one word")
    if len(tokens) != len(tags):
        raise RowProblem(f"{len(tokens)} tokens and {len(tags)} tags; expected a tag for each token")
    for place, (word, tag) in enumerate(zip(tokens, tags, strict=True)):
        if not isinstance(word, str) or not word.strip():
            is_ = kind_of(word) if not isinstance(word, str) else "empty"
            raise RowProblem(f"tokens[{place}] is {is_}; expected a word")
        if isinstance(tag, bool) or not isinstance(tag, str | int) or tag == "":
            raise RowProblem(f"tags[{place}] is {kind_of(tag) if tag != '' else 'empty'}; expected text, or a number")
    if len({isinstance(tag, str) for tag in tags}) > 1:
        raise RowProblem("tags are text and numbers; expected one kind")
    return {"tokens": tuple(tokens), "tags": tuple(tags)}, set()


def _chat(record: Mapping[str, Any], key: str = "messages") -> tuple[dict[str, Any], set[str]]:
    messages, unlearned = conversation(record[key], key)
    if (system := record.get("system")) not in (None, ""):
        if not isinstance(system, str):
            raise RowProblem(f"system is {kind_of(system)}, expected text")
        if messages[0]["role"] == "system":
            if messages[0]["content"] != system:
                raise RowProblem(f"system is given twice: as a column and as the first of {key}; keep one")
        else:
            messages = [{"role": "system", "content": system}, *messages]
            unlearned = tuple(place + 1 for place in unlearned)
    fields = {
        "messages": messages, "unlearned": unlearned, "tools": _objects(record, "tools"),
        "documents": _objects(record, "documents"), "template_kwargs": _object(record, "chat_template_kwargs"),
    }  # fmt: skip
    return fields, {"system", "tools", "documents", "chat_template_kwargs"}


def _sharegpt(record: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    return _chat(record, "conversations")


def _alpaca(record: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca); a `system` stands in place of its preamble,
    and each pair of `history` before it."""
    instruction, extra = string(record, "instruction"), record.get("input") or ""
    if not isinstance(extra, str):
        raise RowProblem(f"input is {type(extra).__name__}, expected text")
    if not isinstance(system := record.get("system") or "", str):
        raise RowProblem(f"system is {kind_of(system)}, expected text")
    preamble = (system or _PREAMBLE.format(paired=_PAIRED if extra else "")) + "\n\n"
    pairs = _history(record)
    turns = [f"### Instruction:\n{asked}\n\n### Response:\n" for asked, _ in pairs]
    context = f"\n\n### Input:\n{extra}" if extra else ""
    turns = [*turns, f"### Instruction:\n{instruction}{context}\n\n### Response:\n"]
    turns[0] = preamble + turns[0]
    history = tuple((turn, answer) for turn, (_, answer) in zip(turns, pairs, strict=False))
    fields = {"prompt": turns[-1], "completion": string(record, "output"), "history": history}
    return fields, {"input", "system", "history"}


_READERS: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (("prompt", "completion"), _prompt, "prompt"), (("messages",), _chat, "messages"),
    (("conversations",), _sharegpt, "sharegpt"), (("instruction", "output"), _alpaca, "alpaca"),
    (("tokens", "tags"), _tokens, "tokens"), (("text",), _text, "text"),
)  # fmt: skip


def other_shapes(row: Row) -> list[str]:
    """The shapes that a row holds beside the one that was taken, by the key that names them in `columns`."""
    if not row.columns:
        return []
    return [keys[0] for keys, _, name in _READERS if name != row.shape and all(key in row.columns for key in keys)]


def _history(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = json_value(record.get("history") or [], "history")
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        for pair in pairs
    ):
        raise RowProblem(f"history is {kind_of(record['history'])}, expected a list of [instruction, response] pairs")
    return [(str(asked), str(answer)) for asked, answer in pairs]


def _objects(record: Mapping[str, Any], key: str) -> list[Any] | None:
    """A list of objects, given as such or as JSON; None where there is none."""
    found = json_value(record.get(key), key)
    if not found:
        return None
    if isinstance(found, list):  # Arrow keeps lists of unlike objects as JSON texts
        found = [json_value(part, key) for part in found]
    if not isinstance(found, list | tuple) or not all(isinstance(part, Mapping) for part in found):
        raise RowProblem(f"{key} is {kind_of(found)}, expected a list of objects")
    return list(found)


def _object(record: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    found = json_value(record.get(key), key)
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise RowProblem(f"{key} is {kind_of(found)}, expected an object")
    return dict(found)


def shortened(name: str) -> str:
    """A key as a message names it."""
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."


def unencodable(text: str) -> str | None:
    """What in a text is no Unicode text, so that no tokenizer takes it, as an escape: `'\\ud83d'`; else None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return ascii(text[error.start])
    return None


def _check_text(record: Mapping[str, Any]) -> None:
    """Raises RowProblem for text that is none (half a surrogate pair), and for what is nested too deeply."""
    # not by recursion: what this refuses is what recursion would fail on
    waiting = [(str(key), part, 1) for key, value in record.items() for part in (key, value)]
    while waiting:
        key, value, depth = waiting.pop()
        if isinstance(value, str):
            if (wrong := unencodable(value)) is not None:
                raise RowProblem(f"{ascii(key)[1:-1]} holds {wrong}, half a character; expected Unicode text")
        elif isinstance(value, Mapping | list | tuple):
            if depth > _DEEPEST:
                raise RowProblem(f"{key} is nested more than {_DEEPEST} levels deep; expected text or a flat list")
            parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            waiting.extend((key, part, depth + 1) for part in parts)
        elif type(value) not in _PLAIN and key in _SHOWN and not isinstance(value, _OTHERS):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise RowProblem(f"{ascii(key)[1:-1]} holds a {kind}; expected texts, numbers, lists and objects")


def string(record: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    """A text of a record. Raises RowProblem: it is something else, or empty."""
    value = record[key]
    if not isinstance(value, str):
        raise RowProblem(f"{key} is {kind_of(value)}, expected text")
    if not empty and not value.strip():
        raise RowProblem(f"{key} is empty; expected text")
    return value


def _strings(record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = record.get(key)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise RowProblem(f"{key} is {kind_of(value)}, expected a list of texts")
    return tuple(value)


def _missing(record: Mapping[str, Any]) -> str:
    keys = [shortened(str(key)) for key in itertools.islice(record, _NAMED)]
    pairs = (("prompt", "completion"), ("instruction", "output"), ("tokens", "tags"))
    for key, other in (pair for one, two in pairs for pair in ((one, two), (two, one))):
        if record.get(key) is not None:
            if other in record:
                return f"{other} is null; expected text"
            near = difflib.get_close_matches(other, keys, n=1, cutoff=0.6)
            return f"{key} without {other}" + (f" (is {near[0]!r} meant?)" if near else "") + f"; {EXPECTED}"
    if nulls := [key for key in keys if key in SHAPES and record[key] is None]:
        return f"{nulls[0]} is null; {EXPECTED}"
    alike = [(k, m[0]) for k in keys if (m := difflib.get_close_matches(k, SHAPES, n=1, cutoff=0.7))]
    hint = f" (did you mean {alike[0][1]!r} for {alike[0][0]!r}?)" if alike else ""
    rest = f" and {len(record) - len(keys)} more" if len(record) > len(keys) else ""
    return f"has {', '.join(keys) or 'no keys'}{rest}{hint}; {EXPECTED}, or `columns` that rename yours"
