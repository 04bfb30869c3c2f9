"""Rows for a head: their classes, what is wrong with them, their ids, and the labels of batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from spectune.data import Labels, collate, encode, find_labels, load_rows, task_type_of
from spectune.data.labelled import LabelledExample
from spectune.errors import DataError
from tests.support import make_tokenizer
from tests.support.tokenizers_zoo import byte_level, metaspace, wordpiece

TOKENIZER = make_tokenizer()
WORDS = {"tokens": ["New", "York", "is", "far"], "tags": ["B-LOC", "I-LOC", "O", "O"]}


def texts(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {place}", "label": label} for place, label in enumerate(labels)]


def labels_of(rows: Any, task_type: str | None = None, **known: Any) -> Labels | None:
    found = load_rows(rows)
    return find_labels(found, task_type or task_type_of(found), **known)


def encoded(rows: list[dict[str, Any]], max_length: int = 64, **how: Any) -> list[LabelledExample]:
    found = load_rows(rows)
    labels = find_labels(found, task_type_of(found))
    examples = encode(found, TOKENIZER, max_length=max_length, labels=labels, **how).examples
    return [example for example in examples if isinstance(example, LabelledExample)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (texts("b", "a", "b"), Labels("SEQ_CLS", ("a", "b"))),
        (texts(10, 9, 2), Labels("SEQ_CLS", ("2", "9", "10"))),
        (texts("no", "yes"), Labels("SEQ_CLS", ("no", "yes"))),
        (texts(True, False), Labels("SEQ_CLS", ("false", "true"))),
        (texts(1, 2.5), Labels("SEQ_CLS")),
        (texts("1", "2.5"), Labels("SEQ_CLS")),
        ([WORDS], Labels("TOKEN_CLS", ("B-LOC", "I-LOC", "O"))),
        ([{"tokens": ["a", "b"], "tags": [1, 0]}], Labels("TOKEN_CLS", ("0", "1"))),
        ([{"text": "a"}, {"prompt": "a", "completion": "b", "label": "c"}], None),
    ],
)
def test_rows_say_what_is_learned_of_them(rows: list[dict[str, Any]], expected: Labels | None) -> None:
    assert labels_of(rows) == expected


def test_answered_prompts_are_rows_for_a_head_with_the_answer_as_their_class() -> None:
    rows = [
        {"prompt": "is it?", "completion": " yes", "label": "a finer label, which is not the answer"},
        {"prompt": "was it?", "completion": "no\n"},
        {"prompt": "will it?", "completion": " No", "choices": ["yes", "no"], "label": "no"},
        {"messages": [{"role": "user", "content": "and now?"}, {"role": "assistant", "content": "no"}]},
    ]
    assert labels_of(rows, "SEQ_CLS") == Labels("SEQ_CLS", ("no", "yes"))


def test_a_checkpoint_s_classes_keep_their_order_and_may_be_named_by_number() -> None:
    known = {0: "negative", 1: "neutral", 2: "positive"}
    for rows in (texts("positive", "negative"), texts(2, 0)):
        labels = labels_of(rows, known=known)
        assert labels == Labels("SEQ_CLS", ("negative", "neutral", "positive"))
        assert [labels.number_of(row["label"]) for row in rows] == [2, 0]
    assert labels_of(texts("good", "bad"), known=known) == Labels("SEQ_CLS", ("bad", "good"))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "a", "label": float("nan")}, "label is nan; expected a finite number"),
        ({"text": " ", "label": "x"}, "text is empty"),
        ({"text": "a", "label": ["x"]}, "label is list"),
        ({"text": "a", "label": ""}, "label is empty"),
        ({"text": "a"}, "has no label (text); expected text + label"),
        ({"text": "a", "label": 3}, "the label 3 is a number; expected text, as in most rows"),
        ({"prompt": "a"}, "prompt without completion"),
    ],
)
def test_a_row_that_is_none_for_a_head_is_named_by_its_line(row: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [*texts("x", "y", "x"), row]))
    with pytest.raises(DataError) as caught:
        labels_of(path)
    assert f"{path}:4: {told}" in str(caught.value)
    assert "1 bad of 4 rows" in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "tags", "told"),
    [
        (["a"], ["x", "y"], "1 tokens and 2 tags"),
        ([], [], "tokens is empty"),
        (["a", " "], ["x", "y"], "tokens[1] is empty"),
        (["a", 3], ["x", "y"], "tokens[1] is int '3'"),
        (["a", "b"], ["x", 1], "tags are text and numbers"),
        (["a", "b"], ["x", None], "tags[1] is null"),
        ("a b", ["x", "y"], "tokens is str 'a b'"),
        (["a"], None, "tags is null"),
    ],
)
def test_words_and_tags_that_do_not_belong_together_are_refused(tokens: Any, tags: Any, told: str) -> None:
    with pytest.raises(DataError, match=r"row 2: ") as caught:
        load_rows([WORDS, {"tokens": tokens, "tags": tags}])
    assert told in str(caught.value)


def test_all_bad_rows_are_named_at_once_and_may_be_skipped() -> None:
    rows = [*texts("x", "y"), {"text": "a"}, *texts(7)]
    with pytest.raises(DataError, match="2 bad of 4 rows"):
        labels_of(rows)
    found = load_rows(rows, skip_bad_rows=True)
    labels = find_labels(found, "SEQ_CLS")
    made = encode(found, TOKENIZER, max_length=16, labels=labels)
    assert (labels, made.report.kept, len(made.report.bad)) == (Labels("SEQ_CLS", ("x", "y")), 2, 2)


def test_a_label_that_training_rows_have_not_is_named() -> None:
    with pytest.raises(DataError, match=r"row 2: the label 'z' is none of the classes x, y"):
        encode(load_rows(texts("x", "z")), TOKENIZER, max_length=16, labels=Labels("SEQ_CLS", ("x", "y")))


def test_one_class_alone_is_none() -> None:
    with pytest.raises(DataError, match="all rows have the label 'x'; expected at least two classes"):
        labels_of(texts("x", "x"))


def test_a_text_has_its_own_ids_and_no_eos_behind_them() -> None:
    for example in encoded(texts("x", "y")):
        assert example.input_ids == TOKENIZER(example.row.text)["input_ids"]
        assert example.last_id != TOKENIZER.eos_token_id
        assert example.target_tokens == 1


@pytest.mark.parametrize(("truncation", "kept"), [("start", slice(-4, None)), ("middle", None)])
def test_what_a_text_loses_is_accounted_for(truncation: str, kept: slice | None) -> None:
    rows = load_rows(texts("x", "y"))
    whole = encode(rows, TOKENIZER, max_length=64, labels=Labels("SEQ_CLS", ("x", "y"))).examples
    made = encode(rows, TOKENIZER, max_length=4, labels=Labels("SEQ_CLS", ("x", "y")), truncation=truncation)
    ids = whole[0].input_ids
    assert made.examples[0].input_ids == (ids[kept] if kept else [*ids[:2], *ids[-2:]])
    assert made.report.tokens_lost == sum(example.length - 4 for example in whole)
    assert made.report.to_dict()["labels"] == {"x": 1, "y": 1}
    with pytest.raises(DataError, match="max_length is 4; truncation=start or middle would cut it"):
        encode(rows, TOKENIZER, max_length=4, labels=Labels("SEQ_CLS", ("x", "y")), truncation="refuse")


def test_a_word_has_its_class_at_its_first_token_alone() -> None:
    # a byte-level BPE that cuts at spaces: a word has the tokens that it has behind a space, but for the first
    words = [TOKENIZER(text)["input_ids"] for text in ("New", " York", " is", " far")]
    [example] = encoded([WORDS])
    assert example.input_ids == [token for word in words for token in word]
    expected = [label for word, n in zip(words, (0, 1, 2, 2), strict=True) for label in [n] + [-100] * (len(word) - 1)]
    assert example.token_labels() == expected
    assert example.target_tokens == 4


@pytest.mark.parametrize("make", [byte_level, metaspace, wordpiece])
def test_words_have_a_token_each_under_tokenizers_of_all_kinds(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer, words = make(), ["question", ":", "the", "town", "of", "York", "yes.no", "hi"]
    rows = load_rows([{"tokens": words, "tags": [str(n) for n in range(len(words))]}])
    [example] = encode(rows, tokenizer, max_length=64, labels=find_labels(rows, "TOKEN_CLS")).examples
    assert isinstance(example, LabelledExample)
    assert [example.token_labels()[place] for place in example.places] == list(range(len(words)))
    for word, begin, end in zip(words, example.places, [*example.places[1:], example.length], strict=True):
        said = tokenizer.decode(example.input_ids[begin:end]).replace(" ", "")
        assert said.casefold() == word.casefold()


def test_words_that_are_cut_have_no_loss() -> None:
    rows = load_rows([WORDS])
    last = len(TOKENIZER(" far")["input_ids"])
    made = encode(rows, TOKENIZER, max_length=last, labels=find_labels(rows, "TOKEN_CLS"))
    [example] = made.examples
    assert isinstance(example, LabelledExample)
    assert (list(example.words), list(example.places)) == ([3], [0])
    assert made.report.unscored_words == 3


def test_batches_have_labels_of_rows_or_of_words() -> None:
    classes = collate(encoded(texts("x", "y", "x")), 0)["labels"]
    assert (classes.dtype, classes.tolist()) == (torch.int64, [0, 1, 0])
    numbers = collate(encoded(texts(1.5, 2)), 0)["labels"]
    assert (numbers.dtype, numbers.tolist()) == (torch.float32, [1.5, 2.0])
    examples = encoded([WORDS, {"tokens": ["far"], "tags": ["O"]}])
    for side in ("right", "left"):
        batch = collate(examples, 0, padding_side=side)
        assert batch["labels"].shape == batch["input_ids"].shape
        for row, mask, example in zip(batch["labels"], batch["attention_mask"], examples, strict=True):
            assert row[mask.bool()].tolist() == example.token_labels()
            assert (row[~mask.bool()] == -100).all()


def test_a_csv_s_cells_hold_lists_as_json_and_numbers_as_text(tmp_path: Path) -> None:
    (tmp_path / "tags.csv").write_text('tokens,tags\n"[""a"", ""b""]","[""x"", ""y""]"\n')
    (tmp_path / "numbers.csv").write_text("text,label\na,1.5\nb,2.0\n")
    assert load_rows(tmp_path / "tags.csv")[0].tags == ("x", "y")
    rows = load_rows(tmp_path / "numbers.csv")
    made = encode(rows, TOKENIZER, max_length=8, labels=find_labels(rows, task_type_of(rows)))
    assert [example.label for example in made.examples if isinstance(example, LabelledExample)] == [1.5, 2.0]


def test_what_cannot_be_read_and_what_has_another_label_than_most_is_said_at_once() -> None:
    rows = [*texts("x", "y", "z"), {"text": "", "label": "x"}, {"text": "a", "label": float("inf")}, *texts(3)]
    with pytest.raises(DataError, match="3 bad of 6 rows") as caught:
        load_rows(rows)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["row 4", "row 5", "row 6"]
