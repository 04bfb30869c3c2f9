"""Whether a chat template writes all that a row holds: what it leaves out without a word would be lost."""

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from spectune.data.chats.conversations import REASONING
from spectune.data.chats.message_forms import MessageForms
from spectune.data.problem import RowProblem
from spectune.data.shapes import Row

_THOUGHT_ENDS = "</think>"


def visible(content: str) -> str:
    """An answer without the thought before it, which templates cut from earlier turns."""
    return content.rpartition(_THOUGHT_ENDS)[2].strip()


def check_rendered(
    row: Row, text: str, template: str, left_out: Collection[int], *, forms: MessageForms | None = None
) -> None:
    """Look for each message, tool, document and argument in a conversation as it was rendered.

    Args:
        template: the template's own text.
        left_out: places of messages that the template is known to leave out.
        forms: what the template is known to write of calls, where the row has some; a call's name that stands in the
            text may be that of a listed tool, or of another call.

    Raises:
        RowProblem: something of the row is not there.
    """
    messages = row.messages or []
    for place, message in enumerate(messages):
        if message["content"].strip() and (place in left_out or not _written(message, text)):
            if message.get("tool_calls"):
                raise RowProblem(
                    f"messages[{place + 1}]: the chat template writes a tool call without the words beside it: "
                    f"{message['content'][:40]!r}; take them out of the message"
                )
            raise RowProblem(
                f"messages[{place + 1}] (role {message['role']!r}) is not in the text that the chat template writes: "
                f"{message['content'][:40]!r}; use a role that the template knows, or leave the message out"
            )
        for call in message.get("tool_calls", ()):
            if (name := call["function"]["name"]) not in text or (forms and not forms.calls_written):
                raise RowProblem(f"messages[{place + 1}]: the chat template does not write the call of {name!r}")
        if forms and forms.first_call_alone and len(message.get("tool_calls", ())) > 1:
            raise RowProblem(
                f"messages[{place + 1}]: the chat template writes the first of several calls alone; write each as a "
                "message of its own, with its result behind it"
            )
    last = messages[-1] if messages else {}
    if (thought := reasoning(last)) and thought not in text:
        raise RowProblem(f"messages[{len(messages)}]: the chat template does not write the reasoning of the last turn")
    for tool in row.tools or ():
        name = tool.get("function", tool).get("name") if isinstance(tool.get("function", tool), dict) else None
        if name is not None and str(name) not in text:
            raise RowProblem(f"tools: the chat template does not write {name!r}; drop the column, or use another base")
    if row.documents and not re.search(r"\bdocuments\b", template):
        raise RowProblem("documents: the chat template does not use them; drop the column, or use another base")
    for key in row.template_kwargs or ():
        if not re.search(rf"\b{re.escape(key)}\b", template):
            raise RowProblem(f"chat_template_kwargs: the chat template has no argument {key!r}")


def reasoning(message: dict[str, Any]) -> str:
    """The reasoning that a message has in a field of its own, else an empty text."""
    return str(next((message[name] for name in REASONING if message.get(name)), "")).strip()


def thoughts(message: dict[str, Any]) -> list[str]:
    """The thoughts of a message: before its answer, and in a field of its own."""
    content = message.get("content") or ""
    inside = content.rpartition(_THOUGHT_ENDS)[0].rpartition("<think>")[2].strip() if _THOUGHT_ENDS in content else ""
    return [part for part in (inside, reasoning(message)) if part]


def thoughts_cut(row: Row, text: str, places: Sequence[int]) -> int:
    """How many of the turns at these places had a thought that the rendered conversation does not hold."""
    count = 0
    for place in places:
        message = (row.messages or [])[place]
        if _THOUGHT_ENDS not in message["content"] and REASONING[0] not in message:
            continue
        count += any(part not in text for part in thoughts(message))
    return count


def _written(message: dict[str, Any], text: str) -> bool:
    content = message["content"].strip()
    if content in text or (message["role"] == "assistant" and visible(content) in text):
        return True
    # inside of what is written as JSON, such as a tool's result
    return any(json.dumps(content, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (False, True))
