"""How one chat template takes what templates disagree about: calls without words, their arguments, and thoughts.

Most write arguments as JSON themselves and take a call's missing content as empty text. Some put the arguments into
their text as they are, and need JSON text (DeepSeek); some tell a call from an answer by its content being null; some
write a thought from its own field alone, and put an empty one before an answer that holds its thought.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from spectune.data.chats.conversations import REASONING
from spectune.data.problem import RowProblem

Message = dict[str, Any]

_NAME, _OTHER, _KEY, _VALUE = "spectuneprobe", "spectuneother", "spectunekey", "spectunevalue"
_OPENS, _CLOSES = "<think>", "</think>"
#: what stands in place of a call's content where there are no words
_CONTENTS: tuple[dict[str, Any], ...] = ({"content": ""}, {"content": None}, {})
_ASKED: Message = {"role": "user", "content": "Hello"}

Render = Callable[[list[Message]], str]


@dataclass(frozen=True, slots=True)
class MessageForms:
    """What messages are to be for a template.

    Attributes:
        content: of a message with calls and no words: the empty text, null, or no such key.
        arguments_as_text: calls have their arguments as JSON text.
        thoughts_apart: a thought inside of the content is moved to the fields of its own.
        calls_written: whether calls are written at all.
        first_call_alone: of several calls in one message the first is written (gpt-oss).
    """

    content: tuple[tuple[str, Any], ...] = (("content", ""),)
    arguments_as_text: bool = False
    thoughts_apart: bool = False
    calls_written: bool = True
    first_call_alone: bool = False

    def shown(self, messages: Iterable[Message]) -> list[Message]:
        return [self._shown(message) for message in messages]

    def _shown(self, message: Message) -> Message:
        content = message.get("content")
        if self.thoughts_apart and message["role"] == "assistant" and _CLOSES in (content or ""):
            before, _, answer = str(content).rpartition(_CLOSES)
            thought = before.partition(_OPENS)[2] if _OPENS in before else before
            if not any(message.get(name) for name in REASONING):
                message = {**message, **dict.fromkeys(REASONING, thought.strip()), "content": answer.lstrip("\n")}
        if not (calls := message.get("tool_calls")):
            return message
        if not message.get("content"):
            message = {**{k: v for k, v in message.items() if k != "content"}, **dict(self.content)}
        if self.arguments_as_text:
            message = {**message, "tool_calls": [_with_text(call) for call in calls]}
        return message


def disputed(messages: Iterable[Message]) -> bool:
    """Whether messages hold something that templates take in different forms."""
    return any(message.get("tool_calls") or _CLOSES in message["content"] for message in messages)


def find_forms(render: Render) -> MessageForms:
    """Try each form on short conversations.

    Args:
        render: messages as the template writes them; raises RowProblem.
    """
    apart = _thoughts_apart(render)
    refused = True
    for as_text in (False, True):
        fits = list[tuple[int, tuple[tuple[str, Any], ...]]]()
        for content in _CONTENTS:
            form = MessageForms(tuple(content.items()), as_text)
            text = _first(render, [form.shown(messages) for messages in _called()])
            refused = refused and text is None
            # neither left away, nor as Python writes it, nor as a text inside of JSON
            wrong = ("{'" + _KEY, '\\"' + _KEY)
            if text and all(part in text for part in (_NAME, _KEY, _VALUE)) and not any(w in text for w in wrong):
                fits.append((len(text), form.content))
        if fits:  # the one with the least around the call: "None", or an empty answer behind it, are longer
            form = MessageForms(min(fits, key=lambda fit: fit[0])[1], as_text, apart)
            two = _first(render, [form.shown(messages) for messages in _called(_NAME, _OTHER)])
            return dataclasses.replace(form, first_call_alone=two is not None and _OTHER not in two)
    named = not refused and any(
        _NAME in (_first(render, [MessageForms().shown(messages)]) or "") for messages in _called()
    )
    return MessageForms(thoughts_apart=apart, calls_written=refused or named)


def _called(*names: str) -> list[list[Message]]:
    """Conversations with a call: one that goes on behind it, and one that ends with it."""
    functions: list[dict[str, Any]] = [{"name": name, "arguments": {_KEY: _VALUE}} for name in names or (_NAME,)]
    calls: list[dict[str, Any]] = [
        {"id": f"spectune{i}", "type": "function", "function": f} for i, f in enumerate(functions, start=1)
    ]
    asked: list[Message] = [_ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]
    results = [{"role": "tool", "name": c["function"]["name"], "tool_call_id": c["id"], "content": "x"} for c in calls]
    return [[*asked, *results, {"role": "assistant", "content": "Hello"}], asked]


def _thoughts_apart(render: Render) -> bool:
    inside = {"role": "assistant", "content": f"{_OPENS}\n{_KEY}\n{_CLOSES}\n\n{_VALUE}"}
    apart = {"role": "assistant", "content": _VALUE, **dict.fromkeys(REASONING, _KEY)}
    one, other = _first(render, [[_ASKED, inside]]), _first(render, [[_ASKED, apart]])
    if one is None or other is None or _KEY not in other:
        return False
    # an empty one before the one in the content; where thoughts are written in other words, content is content
    return one.count(_OPENS) == other.count(_OPENS) + 1 >= 2


def _first(render: Render, conversations: Sequence[list[Message]]) -> str | None:
    """The first of the conversations that the template takes, as text."""
    for messages in conversations:
        try:
            return render(messages)
        except RowProblem:
            continue
    return None


def _with_text(call: Any) -> Any:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
