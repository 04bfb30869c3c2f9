"""What a template puts around an answer, and how it is taken off what was written."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.tiny_tokenizers import CHATML, EMPTY_THOUGHTS, HEADER, byte_level

from spectune.data import Row, encode, load_rows, prompt_ids
from spectune.evaluation import Task
from spectune.evaluation.asked import Asked, _around, ask
from spectune.inference import last_examples

MARKS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")


#: refuses an answer without thoughts
THOUGHTS_ONLY = (
    "{% set last = messages[-1] %}{% if last.role == 'assistant' and '</think>' not in last.content %}"
    "{{ raise_exception('no thoughts') }}{% endif %}"
) + CHATML


def tokenizer_of(template: str) -> Any:
    tokenizer = byte_level(special=MARKS)
    tokenizer.chat_template = template
    return tokenizer


def chat(answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer, **more}]}


def asked(row: dict[str, Any], template: str, **options: Any) -> Asked:
    tokenizer = tokenizer_of(template)
    task = Task.of(load_rows([row]), **{"max_length": 200, **options})
    examples = encode(task.rows, tokenizer, max_length=task.max_length).examples
    [found] = ask(task, tokenizer, last_examples(examples), [tokenizer.eos_token_id], 200)
    return found


@pytest.mark.parametrize("answer", ["yes", "think", "im", "<", "i", ">", "t", "to all", ": ", "a: b"])
@pytest.mark.parametrize(
    ("template", "before"), [(CHATML, ""), (EMPTY_THOUGHTS, "<think>\n\n</think>"), (HEADER, "to all:")]
)
def test_what_stands_around_an_answer_is_found_whatever_the_answer_is(template: str, before: str, answer: str) -> None:
    found = asked(chat(answer), template)
    assert (found.before, found.behind) == (before, "<|im_end|>")
    assert found.references == (answer.strip(),)
    assert found.text(f"{before}\n\nother<|im_end|>\n") == "other"
    assert found.text("other") == "other"
    assert found.text(f"{before} other") == "other"  # it went on too long


def test_room_is_counted_with_the_template_and_eos_and_with_the_references() -> None:
    tokenizer = tokenizer_of(EMPTY_THOUGHTS)
    row = load_rows([chat("yes")])[0]
    [example] = encode([row], tokenizer, max_length=200).examples
    target = len(example.input_ids) - len(prompt_ids(row, tokenizer))
    assert asked(chat("yes"), EMPTY_THOUGHTS).tokens == target > 6
    long = " ".join(["zx"] * 50)
    count = len(tokenizer(long)["input_ids"])
    assert asked(chat("yes") | {"references": ["yes", long]}, EMPTY_THOUGHTS).tokens == count > target


def test_thoughts_that_begin_in_the_prompt() -> None:
    """The prompt ends with `<think>`; so the target has not all that the answer has. And no other answer than one with
    thoughts can be learned behind that prompt."""
    tokenizer = tokenizer_of(THOUGHTS_ONLY)
    row = Row("a:1", **chat("<think>\nthe reason\n</think>\nyes"))
    target = tokenizer("\nthe reason\n</think>\nyes<|im_end|>\n<|endoftext|>")["input_ids"]
    assert _around(row, target, tokenizer, [tokenizer.eos_token_id], {}) == ("", "<|im_end|>")


def test_a_completion_has_nothing_around_it() -> None:
    found = asked({"prompt": "q", "completion": " a<|im_end|>b"}, CHATML)
    assert (found.before, found.behind, found.references) == ("", "", ("a<|im_end|>b",))


def test_a_call_of_a_tool_is_a_part_of_the_answer() -> None:
    call = {"type": "function", "function": {"name": "who", "arguments": {}}}
    found = asked(chat("let me see", tool_calls=[call]), CHATML)
    assert (found.before, found.behind) == ("", "")
    assert found.references[0].startswith("let me see")
