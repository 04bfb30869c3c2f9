"""Where in a rendered conversation each assistant's turn stands: what of a chat is learned.

The template is asked twice about a turn: for the whole conversation, which is what is learned, and for the messages
before the turn with the generation prompt, which is what the model will be asked with. The second has to be a prefix of
the first; the turn is what follows. So what the template itself puts into an answer (an empty thought, a tool call's
brackets, the end of the turn) is learned, and a row for which the two do not agree is refused.
"""

import dataclasses
from collections.abc import Sequence

from spectune.data.chat_template import ChatTemplate, Span, Whole
from spectune.data.problem import RowProblem
from spectune.data.rendering import Rendered, ending_at_eos
from spectune.data.shapes import Row
from spectune.data.template_checks import check_rendered, thoughts_cut, visible


def conversation_sequences(template: ChatTemplate, row: Row, *, last_only: bool = False) -> list[Rendered]:
    """The sequences that a conversation is learned in.

    One, with all learned turns, where each turn's prompt is a prefix of the whole. An earlier turn for which that is
    not so, because the template rewrites what is history, has a sequence of its own before that.

    Raises:
        RowProblem: the template refuses the messages, leaves one of them out, or writes a turn behind another text than
            the one that the model would be asked with.
    """
    messages = row.messages or []
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i not in row.unlearned]
    if last_only:
        places = places[-1:]
    conversation = template.whole(row, messages)
    whole = conversation.text
    check_rendered(row, whole, template.source(row), template.left_out(row))
    found, own = list[Span](), list[Rendered]()
    for place in places:
        stretch = _stretch(template, row, place, conversation)
        if stretch is not None:
            found.append(stretch)
        elif place < len(messages) - 1:
            alone = dataclasses.replace(row, messages=messages[: place + 1], references=(), choices=())
            own += conversation_sequences(template, alone, last_only=True)
        else:
            raise _no_prefix(template, row, place, conversation)
    learned = tuple(
        (start, ending_at_eos(whole, start, stop, template.eos))
        for start, stop in _marked(found, conversation.marks)
        if start < stop
    )
    learned = tuple((start, stop + _eos_behind(template, whole, start, stop)) for start, stop in learned)
    text = whole[: learned[-1][1]] if learned else ""
    return [*own, Rendered(text, learned, len(learned), thoughts_cut(row, whole, places), front=False)]


def _eos_behind(template: ChatTemplate, whole: str, start: int, stop: int) -> int:
    """Characters of an EOS right behind a turn that does not end in one: a template may write it between turns."""
    eos = template.eos
    return len(eos) if eos and whole.startswith(eos, stop) and not whole.endswith(eos, start, stop) else 0


def _stretch(template: ChatTemplate, row: Row, place: int, conversation: Whole) -> Span | None:
    """Where the turn at a place stands in the whole conversation; None where what the model would be asked with is
    not what stands before it."""
    messages, whole = row.messages or [], conversation.text
    prompt, content = template.asked(row, place, conversation), messages[place]["content"]
    if not whole.startswith(prompt) or len(prompt) == len(whole):
        return None
    start = len(prompt)
    if place == len(messages) - 1:
        return start, len(whole)
    end = template.turn.end
    for written in (content, content.strip()) if content and end else ():
        if whole.startswith(written + end, start):
            return start, start + len(written) + len(end)
    part = template.without_trailing(template.beginning(row, place + 1, conversation, generation=False))
    if whole.startswith(part) and len(part) > start:
        return start, len(part)
    # the template writes this turn otherwise now that it is history
    at = whole.find(visible(content), start)
    if at < 0 or not end or end in whole[start:at]:
        return None
    stop = whole.find(end, at + len(visible(content)))
    return None if stop < 0 else (start, stop + len(end))


def _marked(found: Sequence[Span], marks: Sequence[Span] | None) -> list[Span]:
    """Of each turn what the template marks as the assistant's, where it marks any."""
    if marks is None:
        return list(found)
    return [(max(a, begin), end) for a, b in found for begin, end in marks if end > a and begin < b]


def _no_prefix(template: ChatTemplate, row: Row, place: int, conversation: Whole) -> RowProblem:
    prompt, whole = template.asked(row, place, conversation), conversation.text
    alike = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    return RowProblem(
        f"messages[{place + 1}] cannot be learned: the model would be asked with a text that goes on "
        f"{prompt[alike : alike + 40]!r} where the chat template writes {whole[alike : alike + 40]!r}; "
        "write the answer so that it begins as the generation prompt ends"
    )
