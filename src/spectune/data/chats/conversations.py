"""Messages as chat templates take them: one spelling of roles, plain text, tool calls with their arguments as objects.

What other tools write is read: OpenAI's fine-tuning format (`weight`, `tool_calls` with arguments as JSON text, content
in parts; its old `function_call` and role `function`), sharegpt (`from`, `value`, `function_call`, `observation`),
axolotl's `train`.
"""

import json
from collections.abc import Mapping
from typing import Any

from spectune.data.problem import RowProblem
from spectune.data.reading.raw_records import plain

#: other spellings of roles; what is not here goes to the chat template as it is
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
    "chatbot": "assistant", "model": "assistant", "ai": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_call": "assistant", "function": "tool",
}  # fmt: skip
#: transformers shows templates a message's reasoning under each of these names
REASONING = ("reasoning_content", "reasoning", "thinking")
_EXPECTED_MESSAGE = "expected {'role': ..., 'content': text} or {'from': ..., 'value': text}"


def conversation(value: Any, key: str) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """The messages of a chat, and the places of those assistant turns that are not to be learned.

    Args:
        value: what stands under `key`: a list of messages, or that as JSON.

    Raises:
        RowProblem: it is no chat, or does not end with an assistant's message that has something to learn.
    """
    given = json_value(value, key)
    if not isinstance(given, list | tuple) or not given:
        raise RowProblem(f"{key} is {kind_of(given)}, expected a list of messages")
    messages, unlearned = [], []
    for place, message in enumerate(given):
        found = _message(message, f"{key}[{place + 1}]")
        if not _learned(found, f"{key}[{place + 1}]"):
            unlearned.append(place)
        messages.append(found)
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowProblem(f"{key} ends with {last['role']!r}; expected an assistant message, which is what is learned")
    if not last["content"] and not last.get("tool_calls") and not any(last.get(name) for name in REASONING):
        raise RowProblem(f"the last message of {key} is empty; expected text to learn")
    return messages, tuple(unlearned)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowProblem(f"{where} is {kind_of(message)}, {_EXPECTED_MESSAGE}")
    names = ("from", "value") if "role" not in message and "from" in message else ("role", "content")
    role = message.get(names[0])
    if not isinstance(role, str) or not role.strip():
        raise RowProblem(f"{where} has no role; {_EXPECTED_MESSAGE}")
    found: dict[str, Any] = {str(k): v for k, v in message.items() if v is not None and k not in names}
    found["role"] = _ROLES.get(role.strip().lower(), role)
    for name in REASONING:
        if name in found:
            found.update(dict.fromkeys(REASONING, found[name]))
            break
    content = message.get(names[1])
    if role.strip().lower() == "function_call" and "tool_calls" not in found:
        found["tool_calls"], content = json_value(content, where) or [], ""
    if (legacy := found.pop("function_call", None)) and "tool_calls" not in found:
        found["tool_calls"] = [{"function": legacy}]
    if "tool_calls" in found:
        found["tool_calls"] = _tool_calls(found["tool_calls"], f"{where}.tool_calls")
    found["content"] = _content(content, where, optional=bool(found.get("tool_calls")) or REASONING[0] in found)
    if not found.get("tool_calls", True):
        del found["tool_calls"]
    return found


def _content(content: Any, where: str, *, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, list | tuple):
        for part in content:
            if not isinstance(part, str) and not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, Mapping) else None
                named = f"of type {kind!r}" if kind else f"{kind_of(part)}"
                raise RowProblem(f"{where}.content has a part {named}; expected text alone: this is a text model")
        return "\n".join(part if isinstance(part, str) else str(part["text"]) for part in content)
    if not isinstance(content, str):
        raise RowProblem(f"{where}.content is {kind_of(content)}, expected text")
    return content


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = json_value(value, where)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list | tuple):
        raise RowProblem(f"{where} is {kind_of(value)}, expected a list of calls")
    found = []
    for number, call in enumerate(calls, start=1):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowProblem(
                f"{where}[{number}] is {kind_of(call)}, expected {{'function': {{'name': ..., 'arguments': ...}}}}"
            )
        # templates write arguments as JSON themselves: text would be written as a quoted text
        arguments = json_value(function.get("arguments") or {}, f"{where}[{number}].arguments")
        if not isinstance(arguments, Mapping):
            raise RowProblem(f"{where}[{number}].arguments is {kind_of(arguments)}, expected an object")
        made = {**function, "arguments": dict(arguments)}
        named = {k: v for k, v in call.items() if k != "function"} if "function" in call else {}
        found.append({"type": "function", **named, "function": made})
    return found


def _learned(message: dict[str, Any], where: str) -> bool:
    """Whether a turn may be learned; takes `weight` and `train` out of the message, which no template knows."""
    learned = True
    for key in ("weight", "train"):
        if (value := message.pop(key, None)) is None:
            continue
        if value not in (0, 1):  # True and False are
            expected = "0 or 1" if key == "weight" else "true or false"
            raise RowProblem(f"{where}.{key} is {kind_of(value)}, expected {expected}")
        if key == "train" and value and message["role"] != "assistant":
            raise RowProblem(f"{where}.train is true for {message['role']!r}; only assistant turns are learned")
        learned = learned and bool(value)
    return learned or message["role"] != "assistant"


def json_value(value: Any, key: str) -> Any:
    """What stands there, read as JSON where it is text. Raises RowProblem: it is text, and no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return plain(json.loads(value)) if value.strip() else None
    except (ValueError, RecursionError):
        raise RowProblem(f"{key} is {kind_of(value)}, expected a list or object, or that as JSON") from None


def kind_of(value: Any) -> str:
    """What was given, for a message: its type and its beginning."""
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
