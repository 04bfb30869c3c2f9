"""Where in a rendered conversation each assistant's turn stands: what of a chat is learned.

The template is asked twice about a turn: for the whole conversation, which is what is learned, and for the messages
before the turn with the generation prompt, which is what the model will be asked with. The second has to be a prefix of
the first; the turn is what follows. So what the template itself puts into an answer (an empty thought, a tool call's
brackets, the end of the turn) is learned, and a row for which the two do not agree is refused.
"""

import dataclasses
import re
from collections.abc import Sequence

from spectune.data.chats.chat_template import PROBE, ChatTemplate, Span, Whole
from spectune.data.chats.conversations import REASONING
from spectune.data.chats.template_checks import check_rendered, thoughts_cut, visible
from spectune.data.problem import RowProblem
from spectune.data.rendering import Rendered, ending_at_eos
from spectune.data.shapes import Row

#: a generation prompt that ends with a thought which is empty and over, as it does where thoughts are switched off
_NO_THOUGHT = re.compile(
    r"(?:(<think>)\s*(</think>)|(<\|channel>thought)\s*(<channel\|>)|"
    r"(<\|START_THINKING\|>)\s*(<\|END_THINKING\|>))\s*\Z"
)


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
    forms = template.forms(row) if any("tool_calls" in message for message in messages) else None
    check_rendered(row, whole, template.source(row), template.left_out(row), forms=forms)
    greetings = [place for place in places if _is_greeting(row, place)]
    unasked = [place for place in greetings if not _can_be_asked(template, row, place, conversation)]
    places = [place for place in places if place not in unasked]
    found, inside, own, answer = list[Span](), list[int](), list[Rendered](), list[Rendered]()
    for place in places:
        stretch = _stretch(template, row, place, conversation)
        if stretch is not None:
            found.append(stretch if place == len(messages) - 1 else _without_history_s_end(template, whole, stretch))
            inside.append(place)
        elif place < len(messages) - 1:
            alone = dataclasses.replace(row, messages=messages[: place + 1], references=(), choices=())
            own += conversation_sequences(template, alone, last_only=True)
        elif (rewritten := _behind_its_prompt(template, row, conversation)) is not None:
            answer = [rewritten]
        else:
            raise _no_prefix(template, row, place, conversation)
    learned = tuple(
        (start, ending_at_eos(whole, start, stop, template.eos))
        for start, stop in _marked(found, conversation.marks)
        if start < stop
    )
    learned = tuple((start, stop + _eos_behind(template, whole, start, stop)) for start, stop in learned)
    text = whole[: learned[-1][1]] if learned else ""
    cut = thoughts_cut(row, whole, inside)
    rest = Rendered(text, learned, len(learned), cut, len(unasked), front=False)
    if answer and not learned:
        return [*own, dataclasses.replace(answer[0], unasked=len(unasked))]
    return [*own, rest, *answer]


def _is_greeting(row: Row, place: int) -> bool:
    """Whether the assistant begins: nobody has said a thing yet, and somebody will."""
    messages = row.messages or []
    return place < len(messages) - 1 and all(
        message["role"] in ("system", "developer", "assistant") for message in messages[:place]
    )


def _can_be_asked(template: ChatTemplate, row: Row, place: int, conversation: Whole) -> bool:
    """Whether a template that asks for answers asks for the turn at a place, too: some refuse a conversation without a
    question, or write no generation prompt behind it."""
    try:
        prompt = template.asked(row, place, conversation)
        said = template.beginning(row, place, conversation, generation=False)
    except RowProblem:
        return False
    return conversation.text.startswith(prompt) and (
        "add_generation_prompt" not in template.source(row) or prompt != said
    )


def _without_history_s_end(template: ChatTemplate, whole: str, stretch: Span) -> Span:
    """An earlier turn without its end, where a turn ends otherwise when it is written (gpt-oss: with `<|return|>`)."""
    start, stop = stretch
    if not template.turn.ends_otherwise:
        return stretch
    return start, start + len(whole[start:stop].removesuffix(template.turn.end))


def _behind_its_prompt(template: ChatTemplate, row: Row, conversation: Whole) -> Rendered | None:
    """The last turn behind what the model is asked with, where the template writes that otherwise as soon as the answer
    stands there: gpt-oss cuts the thoughts before tool calls, Gemma 4 the empty thought of its generation prompt. None
    where the turn does not begin as the generation prompt says."""
    *before, last = row.messages or []
    whole, prompt = conversation.text, template.asked(row, len(before), conversation)
    if (over := _NO_THOUGHT.search(prompt)) and whole.startswith(prompt[: over.start()]):
        if whole[over.start() :].lstrip().startswith(tuple(filter(None, over.groups()))):
            return None  # it has another thought
        return _behind(template, prompt, whole[over.start() :])
    said = template.beginning(row, len(before), conversation, generation=False)
    asks = prompt[len(said) :] if prompt.startswith(said) else ""
    known = before[-1]["content"].strip() if before else ""
    if not asks.strip() or not known:
        return None
    # where another answer is written alike, this one has not begun
    probe = {**last, **{key: PROBE for key in ("content", *REASONING) if last.get(key)}}
    other = template.render(row, [*before, probe])
    alike = _alike(whole, other)
    begins = whole.rfind(asks, 0, alike)
    if not -1 < whole.rfind(known, 0, alike) < begins:
        return None
    return _behind(template, prompt, whole[begins + len(asks) :])


def _behind(template: ChatTemplate, prompt: str, turn: str) -> Rendered:
    text = prompt + turn
    stop = ending_at_eos(text, len(prompt), len(text), template.eos)
    return Rendered(text[:stop], ((len(prompt), stop),), 1, front=False)


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
    # a call may end otherwise than an answer does: then this end is that of the message behind it
    behind = messages[place + 1]["content"].strip() if messages[place].get("tool_calls") else ""
    if stop < 0 or (behind and -1 < whole.find(behind, start) < stop):
        return None
    return start, stop + len(end)


def _marked(found: Sequence[Span], marks: Sequence[Span] | None) -> list[Span]:
    """Of each turn what the template marks as the assistant's, where it marks any."""
    if marks is None:
        return list(found)
    spans = list[Span]()
    for start, stop in ((max(a, begin), end) for a, b in found for begin, end in marks if end > a and begin < b):
        if spans and spans[-1][1] == start:  # a turn that is marked in pieces
            spans[-1] = spans[-1][0], stop
        else:
            spans.append((start, stop))
    return spans


def _no_prefix(template: ChatTemplate, row: Row, place: int, conversation: Whole) -> RowProblem:
    prompt, whole = template.asked(row, place, conversation), conversation.text
    alike = _alike(prompt, whole)
    switch = "enable_thinking"
    off = re.search(rf"\b{switch}\b", template.source(row)) and switch not in (row.template_kwargs or {})
    return RowProblem(
        f"messages[{place + 1}] cannot be learned: the model would be asked with a text that goes on "
        f"{prompt[alike : alike + 40]!r} where the chat template writes {whole[alike : alike + 40]!r}; "
        "write the answer so that it begins as the generation prompt ends"
        + (f', or try chat_template_kwargs = {{"{switch}": false}}' if off and "<think>" in prompt[-20:] else "")
    )


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin alike with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
