"""Habits of real families' templates: calls, thoughts, greetings, and history that is written anew."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from spectune.data import Encoded, encode, load_rows, prompt_ids
from spectune.errors import DataError
from tests.data.labels_by_hand import CITY, IM_HI, IM_HO, ONE, TOOLS, TWO, bot, call, system, tool, user
from tests.support import family_quirks as quirks
from tests.support.chat_templates import tokenizer_for
from tests.support.marking import marked
from tests.support.tokenizers_zoo import raw_text

BEFORE = "<|im_start|>user\nwhat time<|im_end|>\n<|im_start|>assistant\n"
BEHIND = "\n<|im_start|>tool\n10:15<|im_end|>\n<|im_start|>assistant\n[[ten<|im_end|>]]"
RESULT = [tool("10:15"), bot("ten")]


def encoded(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **columns: Any) -> Encoded:
    return encode(load_rows([{"messages": messages, **columns}]), tokenizer, max_length=4096)


def learned(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **columns: Any) -> list[str]:
    """What is learned of each sequence; the last one begins with what generation is asked with."""
    rows = load_rows([{"messages": messages, **columns}])
    examples = encode(rows, tokenizer, max_length=4096).examples
    asked = prompt_ids(rows[0], tokenizer)
    assert examples[-1].input_ids[: examples[-1].answer_start] == asked
    question = dataclasses.replace(rows[0], messages=rows[0].asked)
    assert prompt_ids(question, tokenizer) == asked
    return [marked(example, tokenizer) for example in examples]


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("arguments", [CITY, json.dumps(CITY)])
def test_a_call_without_words_is_written_once_by_templates_that_want_text_or_null(content: Any, arguments: Any) -> None:
    messages = [user("what time"), bot(content, tool_calls=[call(arguments)]), *RESULT]
    said = learned(messages, quirks.quirky(quirks.TEXT_ARGUMENTS))
    assert said == [BEFORE + '[[<call>get_time\n{"city": "York"}</call><|im_end|>]]' + BEHIND]
    said = learned(messages, quirks.quirky(quirks.NULL_IS_A_CALL))
    assert said == [BEFORE + '[[<call>get_time{"city": "York"}<|im_end|>]]' + BEHIND]


@pytest.mark.parametrize("columns", [{}, {"tools": TOOLS}])
@pytest.mark.parametrize("content", [None, "he said"])
def test_a_call_is_not_taken_for_written_because_its_tool_is_listed(content: Any, columns: dict[str, Any]) -> None:
    messages = [user("what time"), bot(content, tool_calls=[call(CITY)]), *RESULT]
    with pytest.raises(DataError, match=r"messages\[2\]: the chat template does not write the call of 'get_time'"):
        encoded(messages, quirks.quirky(quirks.TOOLS_ALONE), **columns)


def test_words_that_a_template_leaves_out_beside_a_call_are_named_as_such() -> None:
    messages = [user("what time"), bot("he said", tool_calls=[call(CITY)]), *RESULT]
    with pytest.raises(DataError, match=r"writes a tool call without the words beside it: 'he said'; take them out"):
        encoded(messages, tokenizer_for("llama31", "byte_level"))


def test_openai_s_old_function_calls_are_tool_calls_and_results() -> None:
    old = [
        user("what time"),
        {"role": "assistant", "content": None, "function_call": {"name": "get_time", "arguments": json.dumps(CITY)}},
        {"role": "function", "name": "get_time", "content": "10:15"},
        bot("ten"),
    ]
    new = [user("what time"), bot(None, tool_calls=[call(CITY)]), *RESULT]
    for name in ("hermes", "llama31", "granite"):
        tokenizer = tokenizer_for(name, "byte_level")
        assert learned(old, tokenizer) == learned(new, tokenizer)


@pytest.mark.parametrize("before", [[], [system("he said")]])
@pytest.mark.parametrize("template", [quirks.PROMPT_IN_THE_LOOP, quirks.WANTS_A_QUESTION])
def test_a_greeting_that_the_template_cannot_ask_for_is_read_and_not_learned(
    template: str, before: list[dict[str, Any]]
) -> None:
    found = encoded([*before, bot("hello there"), *TWO], quirks.quirky(template))
    start = "<|im_start|>system\nhe said<|im_end|>\n" if before else ""
    greeting = "<|im_start|>assistant\nhello there<|im_end|>\n"
    [example] = found.examples
    said = marked(example, quirks.quirky(template))
    assert said == start + greeting + IM_HI + "[[yes<|im_end|>]]" + IM_HO + "[[no<|im_end|>]]"
    assert (found.report.turns, found.report.unasked) == (2, 1)
    assert found.report.to_dict()["turns_without_a_prompt"] == 1
    assert "1 turns before the first question" in found.report.summary()


def test_a_greeting_behind_another_prompt_than_is_asked_with_is_not_learned() -> None:
    messages = [{"from": "gpt", "value": "hello there"}, *({"from": m["role"], "value": m["content"]} for m in ONE)]
    tokenizer = quirks.quirky(quirks.SYSTEM_IN_THE_LOOP)
    found = encode(load_rows([{"conversations": messages}]), tokenizer, max_length=4096)
    greeting = "<|im_start|>system\nhe said<|im_end|>\n<|im_start|>assistant\nhello there<|im_end|>\n"
    assert [marked(example, tokenizer) for example in found.examples] == [greeting + IM_HI + "[[yes<|im_end|>]]"]


def test_a_greeting_that_can_be_asked_for_is_learned() -> None:
    greeting = "<|im_start|>assistant\n[[hello there<|im_end|>]]\n"
    tokenizer = tokenizer_for("chatml", "byte_level")
    assert learned([bot("hello there"), *ONE], tokenizer) == [greeting + IM_HI + "[[yes<|im_end|>]]"]
    assert encoded([bot("hello there"), *ONE], tokenizer).report.unasked == 0


def test_an_answer_that_nothing_asks_for_is_refused_where_it_is_all() -> None:
    with pytest.raises(DataError, match="No user query"):
        encoded([system("he said"), bot("yes")], quirks.quirky(quirks.WANTS_A_QUESTION))


def test_a_thought_inside_of_an_answer_is_written_once() -> None:
    tokenizer = quirks.quirky(quirks.THOUGHTS_APART)
    right = [IM_HI + "<think>\n[[the reason\n</think>\n\nyes<|im_end|>]]"]
    assert learned([user("hi"), bot("<think>\nthe reason\n</think>\n\nyes")], tokenizer) == right
    assert learned([user("hi"), bot("yes", reasoning_content="the reason")], tokenizer) == right
    assert learned(ONE, tokenizer) == [IM_HI + "<think>\n[[\n</think>\n\nyes<|im_end|>]]"]


OSS = "<|start|>user<|message|>what time<|end|><|start|>assistant"
OSS_CALL = ' to=get_time<|message|>{"city": "York"}<|call|>'
OSS_THOUGHT = "<|channel|>analysis<|message|>the reason<|end|><|start|>assistant"
OSS_RESULT = "<|start|>tool<|message|>10:15<|end|><|start|>assistant"


def test_an_answer_is_learned_behind_what_is_asked_where_history_is_written_anew() -> None:
    messages = [user("what time"), bot(None, tool_calls=[call(CITY)], reasoning_content="the reason"), *RESULT]
    tokenizer = quirks.quirky(quirks.CALLS_WITH_THOUGHTS)
    assert learned(messages, tokenizer) == [
        OSS + "[[" + OSS_THOUGHT + OSS_CALL + "<|return|>]]",
        OSS + OSS_THOUGHT + OSS_CALL + OSS_RESULT + "[[<|channel|>final<|message|>ten<|return|>]]",
    ]
    assert encoded(messages, tokenizer).report.thoughts_cut == 0
    tokenizer = quirks.quirky(quirks.RESULT_ENDS_OTHERWISE)
    messages = [user("what time"), bot(None, tool_calls=[call(CITY)]), *RESULT]
    assert learned(messages, tokenizer) == [
        BEFORE + '[[<call>get_time{"city": "York"}<|im_end|>]]',
        BEFORE + '<call>get_time{"city": "York"}<|im_end|>' + BEHIND,
    ]


def test_no_result_of_a_tool_is_learned_where_calls_end_otherwise_than_answers() -> None:
    thought = {"reasoning_content": "the reason"}
    messages = [user("what time"), bot(None, tool_calls=[call(CITY)], **thought), *RESULT, user("ho"), bot("no")]
    for said in learned(messages, quirks.quirky(quirks.CALLS_WITH_THOUGHTS)):
        assert not any("10:15" in part.partition("]]")[0] for part in said.split("[[")[1:])


def test_the_end_of_an_answer_that_has_become_history_is_not_learned_where_answers_end_otherwise() -> None:
    tokenizer = quirks.quirky(quirks.CALLS_WITH_THOUGHTS)
    hi, ho = (
        "<|start|>user<|message|>hi<|end|><|start|>assistant",
        "<|start|>user<|message|>ho<|end|><|start|>assistant",
    )
    final = "[[<|channel|>final<|message|>"
    assert learned(TWO, tokenizer) == [hi + final + "yes]]<|end|>" + ho + final + "no<|return|>]]"]
    # where the last is not learned, the sequence ends with the other: as it is when it is asked for
    [example] = encoded([*ONE, user("ho"), bot("no", weight=0)], tokenizer).examples
    assert marked(example, tokenizer) == hi + final + "yes<|return|>]]"
    assert raw_text(tokenizer, example.input_ids).count("<|return|>") == 1


def test_a_refusal_names_the_switch_that_a_template_has_for_thoughts() -> None:
    template = (
        quirks.CHATML
        + r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is undefined %}"
        r"{{ '<think>\n' }}{% endif %}{% endif %}"
    )
    with pytest.raises(DataError, match=r'or try chat_template_kwargs = \{"enable_thinking": false\}'):
        encoded(ONE, quirks.quirky(template))
    said = learned(ONE, quirks.quirky(template), chat_template_kwargs={"enable_thinking": False})
    assert said == [IM_HI + "[[yes<|im_end|>]]"]


def test_calls_that_a_template_leaves_away_behind_the_first_are_missed() -> None:
    calls = [call(CITY), call({"city": "Leeds"})]
    messages = [user("what time"), bot(None, tool_calls=calls), tool("10:15"), tool("11:15"), bot("ten")]
    for template in (quirks.CALLS_WITH_THOUGHTS, quirks.NULL_IS_A_CALL):
        with pytest.raises(
            DataError, match=r"messages\[2\]: the chat template writes the first of several calls alone"
        ):
            encoded(messages, quirks.quirky(template))
    [said] = learned(messages, quirks.quirky(quirks.TEXT_ARGUMENTS))
    assert said.startswith(
        BEFORE + '[[<call>get_time\n{"city": "York"}</call><call>get_time\n{"city": "Leeds"}</call><|im_end|>]]'
    )


@pytest.mark.parametrize(
    "thought", [r"<think>\n\n</think>\n\n", r"<|channel>thought\n<channel|>", "<|START_THINKING|><|END_THINKING|>"]
)
def test_an_answer_is_learned_behind_the_empty_thought_of_its_prompt(thought: str) -> None:
    """Gemma 4's template writes it into the generation prompt, and not into what is history."""
    tokenizer = quirks.quirky(quirks.CHATML + quirks.prompt(r"<|im_start|>assistant\n" + thought))
    hi, ho = IM_HI + thought.replace(r"\n", "\n"), IM_HO + thought.replace(r"\n", "\n")
    assert learned(ONE, tokenizer) == [hi + "[[yes<|im_end|>]]"]
    assert learned(TWO, tokenizer) == [hi + "[[yes<|im_end|>]]", IM_HI + "yes<|im_end|>" + ho + "[[no<|im_end|>]]"]
    other = thought.replace(r"\n", "\n").replace("<", "the reason<")[len("the reason") :]
    with pytest.raises(DataError, match=r"messages\[2\] cannot be learned"):
        encoded([user("hi"), bot(other + "yes")], tokenizer)


def test_a_turn_that_is_marked_in_pieces_is_one_turn() -> None:
    template = quirks.turns(
        r"{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        r"{% endgeneration %}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        r"{{ m.content + '<|im_end|>\n' }}{% endif %}"
    )
    tokenizer = quirks.quirky(template + quirks.CHATML_PROMPT)
    assert learned(TWO, tokenizer) == [IM_HI + "[[yes<|im_end|>]]" + IM_HO + "[[no<|im_end|>]]"]
    assert encoded(TWO, tokenizer).report.turns == 2
