"""What is learned of chats under templates of many families, against labels that were written by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from spectune.data import encode, load_rows, prompt_ids
from spectune.errors import DataError
from tests.data.labels_by_hand import CASES, TODAY, Case
from tests.support.chat_templates import TEMPLATES, tokenizer_for
from tests.support.marking import marked
from tests.support.tokenizers_zoo import KINDS, comparable, raw_text

NAMED = {f"{case.template}: {case.name}": case for case in CASES}
LEARNED = [name for name, case in NAMED.items() if not case.refused]
REFUSED = [name for name, case in NAMED.items() if case.refused]
#: what else Metaspace can be
VARIANTS: list[dict[str, str]] = [
    {"prepend": prepend, "model": model} for prepend in ("always", "first") for model in ("bpe", "unigram")
]


def as_shown(case: Case) -> bool:
    """Whether the template is shown the messages just as the record has them."""
    calls = [call for message in case.messages for call in message.get("tool_calls", [])]
    return (
        {message["role"] for message in case.messages} <= {"system", "user", "assistant", "tool", "ipython"}
        and not any({"weight", "train"} & message.keys() for message in case.messages)
        and all(isinstance(value, list | dict) for value in case.columns.values())
        and not any(isinstance(item, str) for item in case.columns.get("tools", []))
        and not any(isinstance(call["function"]["arguments"], str) for call in calls)
    )


def rendered(tokenizer: PreTrainedTokenizerFast, case: Case, count: int, **more: Any) -> str:
    """What transformers itself makes of the first messages, on the day of the test."""
    assert tokenizer.chat_template is not None
    text = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'03 Feb 2026'")
    text = text.replace("strftime_now('%Y-%m-%d')", "'2026-02-03'")
    columns = dict(case.columns)
    columns |= columns.pop("chat_template_kwargs", {})
    return str(
        tokenizer.apply_chat_template(case.messages[:count], tokenize=False, chat_template=text, **columns, **more)
    )


def check(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    [row] = load_rows([case.record])
    examples = encode([row], tokenizer, max_length=4096, today=TODAY, **case.settings).examples
    assert [comparable(tokenizer, marked(example, tokenizer)) for example in examples] == [
        comparable(tokenizer, text) for text in case.learned
    ]
    for example in examples:
        assert example.input_ids[-1] == tokenizer.eos_token_id
        assert max(example.input_ids) < len(tokenizer)
    if "weight" in case.messages[-1]:
        return  # the last answer is not learned, and the sequence does not reach it
    asked = prompt_ids(row, tokenizer, today=TODAY)
    start = getattr(examples[-1], "answer_start", examples[-1].prompt_length)
    assert asked == examples[-1].input_ids[:start]
    answer = case.learned[-1].rindex("[[")
    before = case.learned[-1][:answer].replace("[[", "").replace("]]", "")
    assert comparable(tokenizer, raw_text(tokenizer, asked)) == comparable(tokenizer, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_is_what_was_written(name: str, kind: str) -> None:
    check(NAMED[name], tokenizer_for(NAMED[name].template, kind))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant['prepend']}-{variant['model']}")
def test_what_is_learned_does_not_depend_on_how_metaspace_prepends(variant: dict[str, str]) -> None:
    for template in ("chatml", "empty_thought", "prompt_ends_in_space", "vicuna", "llama2", "mistral_v3", "falcon"):
        for case in CASES:
            if case.template == template and not case.refused:
                check(case, tokenizer_for(template, "metaspace", **variant))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_cannot_show_is_refused_with_the_row_s_name(name: str, kind: str) -> None:
    case = NAMED[name]
    with pytest.raises(DataError) as caught:
        encode(load_rows([case.record]), tokenizer_for(case.template, kind), max_length=4096, today=TODAY)
    assert "row 1" in str(caught.value)
    assert re.search(case.refused, str(caught.value))


@pytest.mark.parametrize("name", LEARNED)
def test_a_prompt_is_what_transformers_asks_with(name: str) -> None:
    case = NAMED[name]
    if TEMPLATES[case.template].prompt == "never" or not as_shown(case):
        return
    tokenizer = tokenizer_for(case.template, "byte_level")
    [row] = load_rows([case.record])
    said = raw_text(tokenizer, prompt_ids(row, tokenizer, today=TODAY))
    assert said == rendered(tokenizer, case, -1, add_generation_prompt=True)


@pytest.mark.parametrize("name", [name for name in LEARNED if as_shown(NAMED[name])])
def test_the_labels_by_hand_are_texts_that_the_templates_write(name: str) -> None:
    """Of the tests, not of the program: a slip of the pen shows here."""
    case = NAMED[name]
    tokenizer = tokenizer_for(case.template, "byte_level")
    ends = [number + 1 for number, message in enumerate(case.messages) if message["role"] == "assistant"]
    texts = [rendered(tokenizer, case, count) for count in ends]
    for text in case.learned:
        plain = text.replace("[[", "").replace("]]", "")
        assert any(whole.startswith((plain, plain.removesuffix(tokenizer.eos_token))) for whole in texts)
    assert any(
        texts[-1].startswith(text.removesuffix(tokenizer.eos_token))
        for text in [case.learned[-1].replace("[[", "").replace("]]", "")]
    )


def test_every_template_has_its_cases() -> None:
    assert {case.template for case in CASES} == set(TEMPLATES)
    assert len(NAMED) == len(CASES)
    assert len(TEMPLATES) >= 28


def test_the_question_alone_is_asked_like_the_answered_chat() -> None:
    for name in TEMPLATES:
        if name in ("deepseek_r1", "qwq"):
            continue  # these have no answer without a thought, the others answer "yes"
        for kind in KINDS:
            tokenizer = tokenizer_for(name, kind)
            asked = [{"role": "user", "content": "hi"}]
            [answered] = load_rows([{"messages": [*asked, {"role": "assistant", "content": "yes"}]}])
            [other] = load_rows([{"messages": [*asked, {"role": "assistant", "content": "no no"}]}])
            ids = prompt_ids(answered, tokenizer, today=TODAY)
            assert ids == prompt_ids(other, tokenizer, today=TODAY)
            assert ids == prompt_ids(type(answered)("row", messages=asked), tokenizer, today=TODAY)
