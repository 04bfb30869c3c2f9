"""A model that knows its rows by heart is right about all of them: exact match 1 and accuracy 1, whatever the template
and the tokenizer do to an answer. Expected texts are written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from tests.data.labels_by_hand import CASES, TODAY
from tests.support import make_model, make_tokenizer
from tests.support.by_heart import ByHeart
from tests.support.chat_templates import TEMPLATES, tokenizer_for
from tests.support.tiny_tokenizers import CHATML, EMPTY_THOUGHTS, HEADER, THINKING, byte_level, metaspace, wordpiece
from tests.support.tokenizers_zoo import KINDS
from transformers import PreTrainedTokenizerFast

from spectune.data import encode, load_rows
from spectune.errors import DataError
from spectune.evaluation import JudgedRow, Task, corpus_metrics, judge
from spectune.methods import FullFineTuning
from spectune.training import TrainingConfig, train

MAKERS: list[Callable[..., Any]] = [byte_level, metaspace, wordpiece]
TURNS = ("<|im_start|>", "<|im_end|>")
THOUGHTS = ("<think>", "</think>")


def by_heart(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[JudgedRow]:
    options = {"max_length": 256, **options}
    conventions = ("max_length", "separator", "train_on", "truncation", "today")
    how = {name: options[name] for name in conventions if name in options}
    loaded = load_rows(rows)
    model = ByHeart(encode(loaded, tokenizer, **how).examples, len(tokenizer))
    return judge(model, tokenizer, Task.of(loaded, **options))


def chat(question: str, answer: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def texts(judged: list[JudgedRow]) -> list[str | None]:
    """What was written, which is what was asked for."""
    found = corpus_metrics(judged)
    assert (found["exact_match"], found["rouge_l"]) == (1, 1)
    assert all(row.prediction == row.references[0] for row in judged)
    return [row.prediction for row in judged]


@pytest.mark.parametrize("make", MAKERS)
def test_completions(make: Callable[..., Any]) -> None:
    lower = make is wordpiece
    tokenizer = make(special=["<river>"])
    eos = tokenizer.eos_token
    answers = [" yes", "The Answer", "a café, naïve", f" no{eos}", f"a{eos} b", "<river>", "the <river> is", "10\n12"]
    rows = [{"prompt": f"question {i}:", "completion": answer} for i, answer in enumerate(answers)]
    wanted = ["yes", "The Answer", "a café, naïve", "no", "a", "<river>", "the <river> is", "10\n12"]
    if lower:
        wanted = ["yes", "the answer", "a cafe, naive", "no", "a", "<river>", "the <river> is", "10 12"]
    assert texts(by_heart(rows, tokenizer)) == wanted
    rows = [{"prompt": "the question", "completion": "yes"}, {"prompt": "another", "completion": "no"}]
    assert texts(by_heart(rows, tokenizer, separator="\n")) == ["yes", "no"]


@pytest.mark.parametrize("make", MAKERS)
def test_references_of_their_own(make: Callable[..., Any]) -> None:
    tokenizer = make(special=["<river>"])
    rows = [
        {"prompt": "question 1:", "completion": "Café", "references": ["other", "Café"]},
        {"prompt": "question 2:", "completion": "<river>", "references": ["<river>"]},
        {"prompt": "question 3:", "completion": "yes", "references": [f"yes{tokenizer.eos_token} or so"]},
        chat("question 4", "The Answer") | {"references": ["The Answer"]},
    ]
    tokenizer.chat_template = EMPTY_THOUGHTS
    judged = by_heart(rows, tokenizer)
    assert corpus_metrics(judged)["exact_match"] == 1
    assert judged[3].references == (judged[3].prediction,)


CHATS = [
    chat("q 1", "yes"),
    chat("q 2", " The Answer\n"),
    chat("q 3", "a café"),
    chat("q 4", "think"),
    chat("q 5", "i"),
]
ANSWERS = ["yes", "The Answer", "a café", "think", "i"]


@pytest.mark.parametrize("template", [CHATML, EMPTY_THOUGHTS, HEADER], ids=["plain", "empty thoughts", "header"])
@pytest.mark.parametrize("end", ["eos", "special", "plain"])
@pytest.mark.parametrize("make", MAKERS)
def test_chats_whose_end_of_turn_is_eos_or_a_special_token_or_an_ordinary_one(
    make: Callable[..., Any], end: str, template: str
) -> None:
    more: dict[str, Any] = {"eos": "<|im_end|>"} if end == "eos" else {}
    added = [*TURNS, *THOUGHTS]
    tokenizer = make(**more, **({"plain": added} if end == "plain" else {"special": added}))
    tokenizer.chat_template = template
    wanted = [answer.lower().replace("é", "e") if make is wordpiece else answer for answer in ANSWERS]
    assert texts(by_heart(CHATS, tokenizer)) == wanted


@pytest.mark.parametrize("make", MAKERS)
def test_answers_that_are_special_tokens_or_stop_inside(make: Callable[..., Any]) -> None:
    tokenizer = make(special=["<river>", *TURNS, *THOUGHTS])
    tokenizer.chat_template = EMPTY_THOUGHTS
    rows = [chat("q 1", "<river>"), chat("q 2", f"was {tokenizer.eos_token} now"), chat("q 3", "the <river> is")]
    assert texts(by_heart(rows, tokenizer)) == ["<river>", "was", "the <river> is"]


def test_several_turns_are_asked_for_the_last_one() -> None:
    tokenizer = byte_level(special=[*TURNS, *THOUGHTS])
    tokenizer.chat_template = EMPTY_THOUGHTS
    turns = [*chat("one", "yes")["messages"], *chat("two", "no")["messages"]]
    [row] = by_heart([{"messages": [{"role": "system", "content": "the system"}, *turns]}], tokenizer)
    assert texts([row]) == ["no"]
    assert row.prompt == "system: the system\nuser: one\nassistant: yes\nuser: two"


def test_the_last_answer_that_is_learned_is_the_one_that_is_asked_for() -> None:
    tokenizer = byte_level(special=[*TURNS, *THOUGHTS])
    tokenizer.chat_template = HEADER
    turns = [*chat("one", "yes")["messages"], *chat("two", "no", weight=0)["messages"]]
    [row] = by_heart([{"messages": turns}], tokenizer)
    assert texts([row]) == ["yes"]
    assert row.prompt == "user: one"


def test_an_answer_longer_than_256_tokens_has_room() -> None:
    long = " ".join(f"w{i}" for i in range(100))
    assert texts(by_heart([{"prompt": "q:", "completion": long}], byte_level(), max_length=500)) == [long]


def test_a_prompt_that_is_cut_is_asked_as_it_was_learned() -> None:
    rows = [{"prompt": f"{i} " + "many words and more " * 20, "completion": " the end"} for i in range(2)]
    for make in MAKERS:
        for truncation in ("start", "middle"):
            assert texts(by_heart(rows, make(), max_length=24, truncation=truncation)) == ["the end"] * 2


LABELS: list[tuple[str, list[str], list[str]]] = [
    ("as they are", ["yes", "no", "maybe so"], ["yes", "no", "maybe so"]),
    ("spaces of the completion", [" yes", " no", " maybe so"], ["yes", "no", "maybe so"]),
    ("spaces of the choices", ["yes", "no", "maybe so"], [" yes", " no", " maybe so"]),
    ("composed unlike", ["cafe\u0301", "no", "yes"], ["café", "no", "yes"]),
    ("special tokens", ["<river>", "<|im_end|>x", "no"], ["<river>", "<|im_end|>x", "no"]),
]


@pytest.mark.parametrize("normalization", ["sum", "token", "byte"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("answers", "choices"), [case[1:] for case in LABELS], ids=[case[0] for case in LABELS])
def test_choices(answers: list[str], choices: list[str], labelled: bool, normalization: str) -> None:
    tokenizer = byte_level(special=["<river>", *TURNS])
    tokenizer.chat_template = CHATML
    rows: list[dict[str, Any]] = []
    for i, answer in enumerate(answers):
        more = {"choices": choices} | ({"label": choices[i]} if labelled else {})
        rows += [{"prompt": f"question {i}:", "completion": answer, **more}, chat(f"question {i}", answer) | more]
    judged = by_heart(rows, tokenizer, choice_normalization=normalization)
    assert set(corpus_metrics(judged).values()) == {1}  # accuracy, and what else the same choices in all rows give
    assert [row.prediction for row in judged] == [choice for choice in choices for _ in range(2)]


def test_choices_under_other_tokenizers() -> None:
    for make in MAKERS:
        rows = [
            {"prompt": f"q {i}:", "completion": f" {a}", "choices": ["Yes", "No"]} for i, a in enumerate(["Yes", "No"])
        ]
        assert set(corpus_metrics(by_heart(rows, make())).values()) == {1}


def test_choices_that_a_tokenizer_does_not_tell_apart_are_no_tie() -> None:
    row = {"prompt": "q:", "completion": " yes", "choices": ["yes", "Yes", "no"]}
    with pytest.raises(DataError, match="cannot be compared") as caught:
        by_heart([row], wordpiece())
    assert caught.value.problems == [
        "row 1: its choices 'yes' and 'Yes' are the same tokens; expected choices that differ"
    ]


def test_a_tool_call_without_content_is_its_own_reference() -> None:
    tokenizer = byte_level(special=TURNS)
    tokenizer.chat_template = CHATML
    call = {"type": "function", "function": {"name": "who", "arguments": '{"x": 1}'}}
    [judged] = by_heart([chat("who", None, tool_calls=[call])], tokenizer)
    [text] = texts([judged])
    assert text
    assert '"name": "who"' in text


def test_earlier_turns_of_alpaca_rows_are_in_the_prompt() -> None:
    row = {"instruction": "and two?", "input": "", "output": "yes", "history": [["one?", "no"]]}
    for train_on in ("all", "last"):
        [judged] = by_heart([row], byte_level(), train_on=train_on)
        assert texts([judged]) == ["yes"]
        assert judged.prompt is not None
        assert judged.prompt.index("one?") < judged.prompt.index("no") < judged.prompt.index("and two?")


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_thoughts_that_the_template_cuts_from_earlier_turns(train_on: str) -> None:
    """The generation prompt ends in `<think>`, earlier turns are without their thoughts."""
    tokenizer = byte_level(special=[*TURNS, *THOUGHTS])
    tokenizer.chat_template = THINKING
    first = chat("one", "<think>\nthe reason\n</think>\nyes")["messages"]
    second = chat("two", "<think>\nanother one\n</think>\nno")["messages"]
    rows = [{"messages": first}, {"messages": [*first, *second]}]
    wanted = ["the reason\n</think>\nyes", "another one\n</think>\nno"]
    assert texts(by_heart(rows, tokenizer, train_on=train_on)) == wanted


#: with the others, which cut words otherwise, every third template
EVERY = "byte_level"


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        pytest.param(template, kind, marks=() if kind == EVERY or number % 3 == 0 else pytest.mark.slow)
        for number, template in enumerate(sorted(TEMPLATES))
        for kind in KINDS
    ],
)
def test_every_family_s_template(template: str, kind: str) -> None:
    """The conversations whose labels are written out by hand, one by one: two may ask the same and answer otherwise."""
    tokenizer = tokenizer_for(template, kind)
    for case in CASES:
        if case.template == template and not case.refused:
            judged = by_heart([case.record], tokenizer, max_length=400, today=TODAY, **case.settings)
            assert texts(judged) == [judged[0].references[0]], case.name


def test_a_trained_model() -> None:
    """Not only the stand-in: full fine-tuning on the rows themselves."""
    tokenizer = make_tokenizer(chat=True)
    labels = ["yes", "no"]
    rows = [chat("town?", "Leeds"), chat("name?", "Ada"), {"prompt": "fox:", "completion": " the lazy dog"}]
    choose = [{"prompt": f"is {i} even?", "completion": f" {labels[i % 2]}", "choices": labels} for i in range(2)]
    model = make_model()
    config = TrainingConfig(max_steps=50, learning_rate=1e-2, per_device_train_batch_size=8, seed=1)
    train(model, tokenizer, FullFineTuning(), rows + choose, rows, config, console=Console(quiet=True))
    judged = judge(model, tokenizer, Task.of(load_rows(rows + choose), max_length=60))
    assert corpus_metrics(judged)["accuracy"] == 1
    assert texts(judged[:3]) == ["Leeds", "Ada", "the lazy dog"]
