"""What holds for any conversation under any template: it is learned as it is rendered, or its row is refused by name.

Every message here ends with a word that occurs nowhere else (`zq7zq`), so that one sees of each turn whether it is
learned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from spectune.data import Example, Row, encode, load_rows, prompt_ids
from spectune.errors import DataError
from tests.support.chat_templates import TEMPLATES, tokenizer_for
from tests.support.marking import stretches
from tests.support.tokenizers_zoo import KINDS, comparable, kind_of, raw_text

TODAY = "2026-02-03"
PROPERTY = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
#: these refuse answers without a thought, since their prompts begin one; the second refuses all
THOUGHTFUL = ("qwq", "deepseek_r1")
#: these write a turn in another way when others follow it, and not in its end alone
REWRITING = ("qwen3", "harmony")
#: what a turn may end with under any template
ENDS = re.compile(r"(\s|</s>|<\|end\|>|<\|return\|>|<\|im_end\|>|<\|endoftext\|>|<eos>)*$")
MARKS = (
    "<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n", "<|endoftext|>", "</s>", "<s>", "[INST]", "[/INST]",
    "<think>", "</think>", "<|end|>", "<|user|>", "Assistant:", " ", "  ", "\n", "\n\n", "\t", "é", "e\u0301", "🙂",
    "日本", "a", "yes", " yes", "{{ x }}", "\u2028", "\xa0", "'", '"', "\\n",
)  # fmt: skip
SWITCHES: list[dict[str, Any]] = [{}, {}, {}, {}, {"weight": 0}, {"train": False}, {"weight": 1}]
TEXT = st.text(max_size=8) | st.lists(st.sampled_from(MARKS), max_size=5).map("".join)
WORDS = st.text(alphabet="abc de,.", max_size=12)


@dataclass(frozen=True)
class Conversation:
    """A record, the messages as a template is to see them, and the words of the turns that are learned."""

    record: dict[str, Any]
    shown: list[dict[str, Any]]
    learned: list[str]
    plain: bool

    @property
    def words(self) -> list[str]:
        return re.findall("zq[0-9]+zq", repr(self.shown))


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    plain = draw(st.sampled_from([True, False, False]))
    text = WORDS if plain else TEXT
    count = 0
    given: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    learned: list[str] = []

    def word() -> str:
        nonlocal count
        count += 1
        return f"zq{count}zq"

    def content() -> str:
        ends = st.just("") if plain else st.sampled_from(["", "", "", " ", "\n", "\n\n ", "</s>", "<|im_end|>"])
        return f"{draw(text)} {word()}{draw(ends)}"

    def say(message: dict[str, Any], **only_given: Any) -> None:
        shown.append(message)
        given.append({**message, **only_given})

    if not plain and draw(st.integers(0, 2)) == 0:
        say({"role": "system", "content": draw(st.just("")) if draw(st.booleans()) else content()})
    for _ in range(draw(st.integers(1, 3))):
        say({"role": "user", "content": content()})
        if not plain and draw(st.integers(0, 4)) == 0:
            learned.append(word())
            function = {"name": "get_time", "arguments": {"city": learned[-1]}}
            say(
                {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", "function": function}]},
                content=draw(st.sampled_from(["", None])),
            )
            say({"role": "tool", "content": content(), "tool_call_id": "abcdefghi"})
        answer: dict[str, Any] = {"role": "assistant", "content": content()}
        kind = "none" if plain else draw(st.sampled_from(["none", "none", "inside", "field"]))
        if kind == "inside":
            answer["content"] = f"<think>\n{draw(text)}\n</think>\n{answer['content']}"
        elif kind == "field":
            answer["reasoning_content"] = draw(text) + "the reason"
        switch = (
            {} if plain else draw(st.sampled_from([{}, {}, {}, {}, {"weight": 0}, {"train": False}, {"weight": 1}]))
        )
        if switch in ({}, {"weight": 1}):
            learned.append(f"zq{count}zq")
        say(answer, **switch)
    record: dict[str, Any] = {"messages": given}
    if not plain and draw(st.integers(0, 3)) == 0:
        record["tools"] = [{"type": "function", "function": {"name": "get_time", "description": draw(text)}}]
    return Conversation(record, shown, learned, plain)


def rendered(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> list[str]:
    """What transformers makes of the conversation up to each of the assistant's turns."""
    assert tokenizer.chat_template is not None
    text = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'03 Feb 2026'")
    text = text.replace("strftime_now('%Y-%m-%d')", f"'{TODAY}'")
    ends = [number + 1 for number, message in enumerate(conversation.shown) if message["role"] == "assistant"]
    tools = conversation.record.get("tools")
    return [
        str(tokenizer.apply_chat_template(conversation.shown[:end], tokenize=False, chat_template=text, tools=tools))
        for end in ends
    ]


def check(name: str, kind: str, conversation: Conversation) -> bool:
    """All that has to hold; whether the conversation was learned and not refused."""
    tokenizer = tokenizer_for(name, kind)
    try:
        [row] = load_rows([conversation.record])
        examples = encode([row], tokenizer, max_length=100_000, today=TODAY).examples
    except DataError as error:
        said = str(error)
    else:
        check_examples(name, tokenizer, row, examples, conversation)
        return True
    assert "row 1" in said
    assert not conversation.plain or name in THOUGHTFUL, said
    return False


def check_examples(
    name: str, tokenizer: PreTrainedTokenizerFast, row: Row, examples: list[Example], conversation: Conversation
) -> None:
    assert examples
    whole = rendered(tokenizer, conversation)
    for example in examples:
        check_sequence(example, tokenizer, whole)
        if name not in REWRITING and kind_of(tokenizer) == "byte_level":
            check_ends(example, tokenizer, whole)
    said = "\n".join(
        raw_text(tokenizer, ids) for example in examples for learned, ids in stretches(example) if learned
    ).lower()
    for word in set(conversation.words):
        assert said.count(word) == (word in conversation.learned), (word, said)
    if conversation.words[-1] in conversation.learned:
        asked = prompt_ids(row, tokenizer, today=TODAY)
        start = getattr(examples[-1], "answer_start", examples[-1].prompt_length)
        assert asked == examples[-1].input_ids[:start]


def check_sequence(example: Example, tokenizer: PreTrainedTokenizerFast, whole: list[str]) -> None:
    """Its ids are the rendering's, from the beginning to the end of a turn, and EOS is learned at the end."""
    eos = tokenizer.eos_token
    assert eos is not None
    assert all(0 <= token < len(tokenizer) for token in example.input_ids)
    assert example.input_ids[-1] == tokenizer.eos_token_id
    runs = stretches(example)
    assert runs[-1][0]
    assert not runs[0][0]
    text = raw_text(tokenizer, example.input_ids)
    if "[UNK]" in text or (kind_of(tokenizer) == "wordpiece" and not printable(whole[-1])):
        return  # lost in WordPiece
    found = readable(tokenizer, text)
    last = readable(tokenizer, eos)
    assert any(readable(tokenizer, part).startswith((found, found.removesuffix(last))) for part in whole)


def readable(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    # Metaspace writes its sign for a space, so a text that has the sign itself comes back with a space
    return comparable(tokenizer, text).replace("▁", " ")


def printable(text: str) -> bool:
    return text.isascii() and all(letter.isprintable() or letter in "\n\t" for letter in text)


def check_ends(example: Example, tokenizer: PreTrainedTokenizerFast, whole: list[str]) -> None:
    """Each learned stretch ends where a turn of the assistant's ends, EOS and white space aside."""
    always = "<|im_start|>assistant\n"
    ends = {ending(text.removesuffix(always), tokenizer) for text in whole}
    before = ""
    for learned, ids in stretches(example):
        before += raw_text(tokenizer, ids)
        assert not learned or ending(before, tokenizer) in ends


def ending(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    assert tokenizer.eos_token is not None
    while (shorter := ENDS.sub("", text).removesuffix(tokenizer.eos_token)) != text:
        text = shorter
    return text


@settings(PROPERTY, max_examples=60)
@given(conversations(), st.sampled_from(sorted(TEMPLATES)), st.sampled_from(KINDS))
def test_a_conversation_is_learned_as_it_is_rendered_or_refused(
    conversation: Conversation, name: str, kind: str
) -> None:
    check(name, kind, conversation)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_2000_conversations_are_learned_as_they_are_rendered_or_refused(name: str) -> None:
    learned = 0

    @settings(PROPERTY, max_examples=2000)
    @given(conversations())
    def each(conversation: Conversation) -> None:
        nonlocal learned
        for kind in KINDS:
            learned += check(name, kind, conversation)

    each()
    assert learned > 500 or name in THOUGHTFUL
