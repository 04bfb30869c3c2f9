"""What is known of a conversation's beginning without rendering it is what rendering it gives."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from spectune.data import load_rows
from spectune.data.chats.chat_template import ChatTemplate, Whole
from spectune.data.problem import RowProblem
from tests.data.test_template_properties import PROPERTY, TODAY, Conversation, conversations
from tests.support.chat_templates import CHATML, CHATML_PROMPT, TEMPLATES, tokenizer_for, turns

#: of these every prompt is known
FOLLOWED = ("chatml", "chatml_default_system", "hermes", "llama3", "phi4", "zephyr", "glm4")
USER, ANSWER = {"role": "user", "content": "zq1zq"}, {"role": "assistant", "content": "zq2zq"}
ROUND = r"{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
#: text behind or inside of the loop that depends on what comes later, so that nothing may be taken for known
LOOKING_AHEAD = {
    "the last round": turns(ROUND + "{% if loop.last %}{{ 'end' }}{% endif %}"),
    "the next message": turns("{{ loop.nextitem.role if loop.nextitem is defined else 'none' }}" + ROUND),
    "the number of rounds": turns("{{ loop.length }}" + ROUND),
    "the number of messages": "{{ messages | length }}" + turns(ROUND),
    "the last message first": "{{ messages[-1].content }}" + turns(ROUND),
    "the messages again": turns(ROUND) + "{{ messages | length }}",
    "a second loop": turns("{{ m.role }}") + turns(ROUND),
    "a part of the messages": "{% for m in messages[:2] %}" + ROUND + "{% endfor %}",
    "backwards": "{% for m in messages | reverse %}" + ROUND + "{% endfor %}",
    "what was counted": "{% set n = namespace(rounds=0) %}"
    + turns(ROUND + "{% set n.rounds = n.rounds + 1 %}") + "{{ n.rounds }}",
    "a round's own end": turns("{% if m.role == 'system' %}{% continue %}{% endif %}" + ROUND),
    "an early end": turns(ROUND + "{% if loop.index == 2 %}{% break %}{% endif %}"),
    "a macro that is asked": "{% macro end() %}{{ messages | length }}{% endmacro %}" + turns(ROUND) + "{{ end() }}",
    "whether it is asked, in each round": turns("{{ add_generation_prompt }}" + ROUND),
    "the messages as text": "{{ messages | string }}" + turns(ROUND),
    "the messages as JSON": "{{ messages | tojson }}" + turns(ROUND),
    "whether there are others": turns("{% if messages[1:] == [] %}{{ 'alone' }}{% endif %}" + ROUND),
    "the message that follows": turns("{{ messages[loop.index].role }}" + ROUND),
    "messages put together": "{% for m in messages + messages %}" + ROUND + "{% endfor %}",
    "in another order": "{% for m in [messages[1], messages[0]] %}" + ROUND + "{% endfor %}",
}  # fmt: skip


def check(template: ChatTemplate, record: dict[str, object]) -> list[int]:
    """The counts whose rendering is known, each compared with it."""
    [row] = load_rows([record])
    messages = row.messages or []
    try:
        whole = template.whole(row, messages)
    except RowProblem:
        return []
    if whole.marks is None:
        assert whole.text == template.without_trailing(template.render(row, messages))
    for count in whole.ends:
        for generation in (False, True):
            found = template.beginning(row, count, whole, generation=generation)
            assert found == template.render(row, messages[:count], generation=generation)
    return list(whole.ends)


@settings(PROPERTY, max_examples=150)
@given(conversations(), st.sampled_from(sorted(TEMPLATES)))
def test_what_is_known_of_a_beginning_is_its_rendering(conversation: Conversation, name: str) -> None:
    check(ChatTemplate(tokenizer_for(name, "byte_level"), TODAY), conversation.record)


@pytest.mark.slow
@settings(PROPERTY, max_examples=200)
@given(conversations())
def test_what_is_known_of_a_beginning_is_its_rendering_under_every_template(conversation: Conversation) -> None:
    for name in TEMPLATES:
        check(ChatTemplate(tokenizer_for(name, "byte_level"), TODAY), conversation.record)


@pytest.mark.parametrize("name", FOLLOWED)
def test_all_beginnings_of_a_plain_conversation_are_known(name: str) -> None:
    template = ChatTemplate(tokenizer_for(name, "byte_level"), TODAY)
    assert check(template, {"messages": [USER, ANSWER, USER, ANSWER]}) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", LOOKING_AHEAD)
def test_a_template_that_looks_ahead_is_rendered_for_every_beginning(name: str) -> None:
    tokenizer = tokenizer_for("chatml", "byte_level")
    template = ChatTemplate(_with(tokenizer, LOOKING_AHEAD[name] + CHATML_PROMPT), TODAY)
    for messages in ([USER, ANSWER], [USER, ANSWER, USER, ANSWER], [{**USER, "role": "system"}, USER, ANSWER]):
        check(template, {"messages": messages})


@pytest.mark.parametrize("name", ["the number of messages", "the messages again", "what was counted", "backwards"])
def test_nothing_is_known_where_all_messages_are_looked_at(name: str) -> None:
    template = ChatTemplate(_with(tokenizer_for("chatml", "byte_level"), LOOKING_AHEAD[name] + CHATML_PROMPT), TODAY)
    assert check(template, {"messages": [USER, ANSWER, USER, ANSWER]}) == []


def test_a_conversation_is_rendered_once_and_its_prompts_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(tokenizer_for("chatml", "byte_level"), TODAY)
    rows = load_rows([{"messages": [USER, ANSWER] * 4} for _ in range(3)])
    count = 0
    render = ChatTemplate.render

    def counted(self: ChatTemplate, *args: object, **more: object) -> str:
        nonlocal count
        count += 1
        return render(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ChatTemplate, "render", counted)
    for row in rows:
        whole = template.whole(row, row.messages or [])
        for place in (1, 3, 5, 7):
            template.asked(row, place, whole)
    assert count == 1


def test_a_row_s_own_template_arguments_are_seen_behind_its_messages() -> None:
    text = CHATML + "{{ style }}" + CHATML_PROMPT
    template = ChatTemplate(_with(tokenizer_for("chatml", "byte_level"), text), TODAY)
    for style in ("kind", "curt"):
        record = {"messages": [USER, ANSWER, USER, ANSWER], "chat_template_kwargs": {"style": style}}
        assert check(template, record) == [1, 2, 3, 4]
        [row] = load_rows([record])
        assert style in template.asked(row, 1, template.whole(row, row.messages or []))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_not_known_is_rendered(count: int) -> None:
    template = ChatTemplate(tokenizer_for("chatml", "byte_level"), TODAY)
    [row] = load_rows([{"messages": [USER, ANSWER, USER, ANSWER]}])
    found = template.beginning(row, count, Whole(""), generation=True)
    assert found == template.render(row, (row.messages or [])[:count], generation=True)


def _with(tokenizer: PreTrainedTokenizerFast, text: str) -> PreTrainedTokenizerFast:
    made = copy.copy(tokenizer)
    made.chat_template = text
    return made
