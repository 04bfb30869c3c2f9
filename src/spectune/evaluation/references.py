"""The prompt of a row, its own answer, and what a written answer is compared with, as the row has them."""

import json

from spectune.data import Row
from spectune.inference import answer_of

__all__ = ["answer_of", "asked_place", "has_prompt", "prompt_of", "references_of", "written_of"]


def has_prompt(row: Row) -> bool:
    """Whether the row has a prompt to answer; a `text` row has none."""
    return bool(row.prompt) or bool(row.messages)


def asked_place(row: Row) -> int | None:
    """Of a chat the place of the message that a model is asked for: its last answer that is learned; None where it does
    not end with an answer."""
    if not row.messages or not row.answered:
        return None
    answers = (place for place, message in enumerate(row.messages) if message.get("role") == "assistant")
    return max((place for place in answers if place not in row.unlearned), default=len(row.messages) - 1)


def written_of(row: Row) -> str | None:
    """The text that a model is asked for, word for word; None where the row has none, as a tool call without content
    has not."""
    place = asked_place(row)
    if row.messages is None or place is None:
        return row.completion
    content = row.messages[place].get("content")
    return content if isinstance(content, str) else None


def prompt_of(row: Row) -> str:
    """The prompt as a reader sees it; of a chat the messages before the answer, one a line; with earlier turns."""
    if row.messages:
        return "\n".join(f"{message['role']}: {_said(message)}" for message in row.messages[: asked_place(row)])
    return row.before if row.prompt is not None else row.text or ""


def references_of(row: Row) -> tuple[str, ...]:
    """What a written completion is compared with, before it goes through the tokenizer: the row's references, else its
    own answer without outer spaces; of an answer that only calls tools, the calls."""
    if row.references:
        return row.references
    answer, place = written_of(row), asked_place(row)
    if not answer and row.messages and place is not None:
        answer = _said(row.messages[place])
    return (answer.strip(),) if answer else ()


def _said(message: dict[str, object]) -> str:
    content = message.get("content")
    calls = message.get("tool_calls")
    if content or not calls:
        return content if isinstance(content, str) else "" if content is None else json.dumps(content)
    return json.dumps(calls, ensure_ascii=False)
