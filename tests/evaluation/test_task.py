from __future__ import annotations

from typing import Any

import pytest

from spectune.data import load_rows
from spectune.data.loading import Rows
from spectune.errors import ConfigError, DataError
from spectune.evaluation import Task


def task(rows: list[dict[str, Any]] | Rows, **options: Any) -> Task:
    return Task.of(load_rows(rows), **{"max_length": 32, **options})


def questions(count: int) -> Rows:
    return load_rows([{"prompt": f"q {i}", "completion": ("where", "who")[i % 2]} for i in range(count)])


SENTENCES = [{"prompt": f"p {i}", "completion": f"answer {i}"} for i in range(10)]


def test_rows_with_choices_are_chosen_and_rows_with_answers_written() -> None:
    mixed = [*SENTENCES[:2], {"prompt": "q", "completion": "a", "choices": ["a", "b"], "label": "a"}]
    found = task(mixed)
    assert (found.to_write, found.to_choose, found.choices) == ((0, 1), (2,), ())
    assert found.higher_is_better == dict.fromkeys(
        ("accuracy", "macro_f1", "matthews", "exact_match", "rouge_l", "bleu", "chrf"), True
    )
    assert "the row's choices" in found.describe()
    written = task(mixed, metric="exact_match, chrf")
    assert (written.to_write, written.to_choose) == ((0, 1, 2), ())
    assert set(written.higher_is_better) == {"exact_match", "chrf"}


def test_a_few_answers_over_and_over_are_choices() -> None:
    found = task(questions(4), train_rows=questions(6))
    assert found.choices == ("where", "who")
    assert found.to_choose == (0, 1, 2, 3)
    assert found.to_write == ()
    assert {row.label for row in found.rows} == {"where", "who"}
    assert "2 choices, inferred because every training row is answered with one: 'where', 'who'" in found.describe()


def test_accuracy_by_name_finds_the_same_choices_with_and_without_training_rows() -> None:
    """Training rows of many answers are no reason to refuse what the judged rows show by themselves."""
    few, many = questions(6), load_rows(SENTENCES)
    alone = task(few, metric="accuracy")
    compared = task(few, train_rows=many, metric="accuracy")
    assert alone.to_choose == compared.to_choose == tuple(range(6))
    assert alone.describe() == compared.describe()
    assert "because every row is answered with one" in alone.describe()
    assert task(few, train_rows=many).to_choose == ()
    assert task(questions(6), metric="accuracy").choices == ("where", "who")


@pytest.mark.parametrize(
    "train",
    [
        [],  # nothing shows it
        questions(5),  # "who" twice only
        [*questions(6), *load_rows([{"prompt": "q", "completion": "when"}])],
        load_rows([{"prompt": f"q {i}", "completion": f"label {i % 21}"} for i in range(63)]),
        load_rows([{"prompt": f"q {i}", "completion": ("where", "who " * 20)[i % 2]} for i in range(6)]),
        load_rows([{"prompt": f"q {i}", "completion": "who"} for i in range(6)]),
        load_rows([{"text": "where"}, {"text": "who"}] * 3),
    ],
)
def test_other_answers_are_not(train: Rows) -> None:
    found = task(questions(4), train_rows=train)
    assert found.choices == ()
    assert found.to_write == (0, 1, 2, 3)


def test_nor_are_they_where_a_judged_row_has_another_answer_or_references() -> None:
    other = [*questions(2), *load_rows([{"prompt": "q", "completion": "why"}])]
    assert task(Rows(other, []), train_rows=questions(6)).choices == ()
    several = load_rows([{"prompt": "q", "completion": "who", "references": ["who", "where"]}])
    assert task(several, train_rows=questions(6)).choices == ()


def test_choices_of_chats() -> None:
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"q {i}"},
                {"role": "assistant", "content": "yes" if i % 2 else "no"},
            ]
        }
        for i in range(6)
    ]
    found = task(chats, train_rows=load_rows(chats))
    assert found.choices == ("no", "yes")
    assert [row.label for row in found.rows] == ["no", "yes"] * 3


def test_the_answer_says_which_choice_is_right() -> None:
    choices = {"choices": ["yes", "no"]}
    rows = [
        {"prompt": "q", "completion": " yes", **choices},
        {"prompt": "q", "completion": "no", **choices, "label": "no"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no\n"}], **choices},
    ]
    found = task(rows)
    assert found.to_choose == (0, 1, 2)
    assert [row.label for row in found.rows] == ["yes", "no", "no"]


def test_answers_that_are_none_of_their_choices_are_refused_all_at_once() -> None:
    choices = {"choices": ["yes", "no"]}
    rows = [
        {"prompt": "q", "completion": "yes, indeed", "label": "yes", **choices},
        {"prompt": "q", "completion": "yes", **choices},
        {"prompt": "q", "completion": "no", "label": "yes", **choices},
        {"prompt": "q", "completion": "x", "choices": ["x ", " x"]},
    ]
    for metric in ("auto", "accuracy", "accuracy,bleu"):
        with pytest.raises(DataError, match="3 of 4 rows have choices and are answered with something else") as caught:
            task(rows, metric=metric)
        assert [problem.split(":")[0] for problem in caught.value.problems] == ["row 1", "row 3", "row 4"]
        assert "'yes, indeed'; expected one of 'yes', 'no'" in caught.value.problems[0]
        assert "'no' and its label 'yes'" in caught.value.problems[1]
    assert task(rows, metric="exact_match").to_write == (0, 1, 2, 3)


def test_how_choices_and_bleu_are_counted_is_said() -> None:
    choose = [{"prompt": "q", "completion": "a", "choices": ["a", "b"]}]
    for normalization, said in (
        ("sum", "by likelihood over"), ("token", "likelihood per token"), ("byte", "likelihood per UTF-8 byte"),
    ):  # fmt: skip
        found = task(choose, choice_normalization=normalization)
        assert said in found.describe()
        assert found.conditions()["choice_normalization"] == normalization
    thai = [{"prompt": "q", "completion": "เขาอยู่ที่นี่"}]
    assert "sacrebleu's 'char': the references are in scripts without spaces" in task(thai).describe()
    assert "sacrebleu's '13a'." in task(SENTENCES).describe()
    assert [task(rows).conditions()["bleu_tokenizer"] for rows in (thai, SENTENCES, choose)] == ["char", "13a", None]


def test_rows_to_write_are_evenly_spaced() -> None:
    assert task(SENTENCES, generate_rows=4).to_write == (0, 2, 5, 7)
    assert task(SENTENCES, generate_rows=10).to_write == tuple(range(10))
    assert task(SENTENCES, generate_rows=64).to_write == tuple(range(10))
    assert task(SENTENCES, generate_rows=0).to_write == ()
    assert "4 of 10 rows, evenly spaced" in task(SENTENCES, generate_rows=4).describe()
    with_text = [{"text": "t t"}, *SENTENCES[:3], {"text": "t t"}]
    assert task(with_text, generate_rows=2).to_write == (1, 2)


def test_text_has_its_loss_alone() -> None:
    found = task([{"text": "a b"}, {"text": "c d"}])
    assert (found.to_write, found.to_choose, found.higher_is_better) == ((), (), {})
    assert found.describe() == "Loss is taken of 2 rows. No row is written or chosen."
    assert task(SENTENCES, metric="loss").higher_is_better == {}


def test_conditions_differ_where_measurements_do() -> None:
    one = task(SENTENCES).conditions()
    assert one == task(SENTENCES, batch_size=3).conditions()
    changes: list[dict[str, Any]] = [
        {"metric": "bleu"},
        {"generate_rows": 3},
        {"max_new_tokens": 8},
        {"max_length": 16},
        {"separator": " "},
        {"choice_normalization": "byte"},
    ]
    others = [task(SENTENCES, **change).conditions() for change in changes]
    assert all(other != one for other in others)


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"metric": "rogue_l"}, ConfigError, "did you mean 'rouge_l'"),
        ({"metric": "auto,bleu"}, ConfigError, "expected auto alone"),
        ({"metric": " , "}, ConfigError, "names none"),
        ({"metric": "accuracy"}, DataError, "no row has a prompt, choices and a label"),
        ({"metric": "bleu", "generate_rows": 0}, ConfigError, "needs written rows"),
        ({"metric": "os.path:join,posixpath:join"}, ConfigError, "taken by another metric"),
        ({"choice_normalization": "tokens"}, ConfigError, "did you mean 'token'.*expected one of sum, token, byte"),
        ({"batch_size": 0}, ConfigError, "batch_size = 0"),
    ],
)
def test_what_cannot_be_measured(options: dict[str, Any], error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected):
        task(SENTENCES, **options)


def test_a_text_metric_of_text_rows_and_no_rows() -> None:
    with pytest.raises(DataError, match="no row has a prompt and references"):
        task([{"text": "a b"}], metric="bleu")
    with pytest.raises(DataError, match="no rows to judge on"):
        Task.of([], max_length=32)
