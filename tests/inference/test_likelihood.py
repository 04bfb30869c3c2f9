from __future__ import annotations

import dataclasses

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spectune.data import Row, encode, load_rows
from spectune.errors import DataError
from spectune.inference import CHOICE_NORMALIZATIONS, ChoiceScores, choice_log_likelihoods, row_loss_sums
from spectune.inference.likelihood import choices_as_trained


def rows() -> list[Row]:
    return load_rows(
        [
            {"prompt": "w5 w6 w7", "completion": " w8 w9"},
            {"prompt": "w1", "completion": " w2 w3 w4 w5 w6"},
            {"prompt": "w10 w11 w12 w13", "completion": " w14"},
        ]
    )


@torch.no_grad()
def reference(model: PreTrainedModel, ids: list[int], prompt_length: int) -> float:
    """Minus log p of the targets of one unpadded row, in float64."""
    model.eval()
    log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log_p[t - 1, ids[t]]) for t in range(max(prompt_length, 1), len(ids)))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_row_losses_equal_each_row_alone_in_float64(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    examples = encode(rows(), tokenizer, max_length=32).examples
    sums, counts = row_loss_sums(model, examples, 0, batch_size)
    assert counts == [len(e.input_ids) - e.prompt_length for e in examples] == [3, 6, 2]
    assert all(module.training for module in model.modules())
    expected = [reference(model, list(e.input_ids), e.prompt_length) for e in examples]
    assert sums == pytest.approx(expected, rel=1e-5)


def test_choices_are_scored_as_training_writes_them(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    asked = [
        dataclasses.replace(rows()[0], completion=None, choices=(" w8", " w8 w9", " w3")),
        dataclasses.replace(rows()[1], completion=None, choices=(" w1", " w2")),
    ]
    found = choice_log_likelihoods(model, tokenizer, asked, max_length=32, batch_size=2)
    expected = [
        [-reference(model, [5, 6, 7, *choice, 0], 3) for choice in ([8], [8, 9], [3])],
        [-reference(model, [1, *choice, 0], 1) for choice in ([1], [2])],
    ]
    for scores, wanted in zip(found, expected, strict=True):
        assert scores.log_likelihoods == pytest.approx(wanted, rel=1e-5)
        assert scores.best == max(range(len(wanted)), key=wanted.__getitem__)
    assert [scores.target_tokens for scores in found] == [(2, 3, 2), (2, 2)]


def test_rows_that_ask_nothing_are_all_named(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    without = rows()[0]
    bare = dataclasses.replace(without, prompt=None, completion=None, text="w1 w2", choices=("w1",))
    with pytest.raises(DataError) as caught:
        choice_log_likelihoods(model, tokenizer, [without, bare], max_length=32)
    assert len(caught.value.problems) == 2
    assert "no choices" in caught.value.problems[0]
    assert "no prompt" in caught.value.problems[1]


def choose(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, row: Row, max_length: int = 32
) -> tuple[list[float], tuple[int, ...]]:
    [found] = choice_log_likelihoods(model, tokenizer, [row], max_length=max_length)
    return list(found.log_likelihoods), found.target_tokens


def test_all_choices_stand_behind_the_same_prompt_and_whole(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """However long they are: of a prompt that leaves no room as much as the longest choice has room for."""
    words = [1 + i % 30 for i in range(20)]
    long = [9, 8, 7, 6, 5, 4]
    row = Row("a:1", prompt=" ".join(f"w{i}" for i in words), choices=(" w3", "".join(f" w{i}" for i in long)))
    found, tokens = choose(model, tokenizer, row, max_length=12)
    kept = words[-(12 - 7) :]
    expected = [-reference(model, [*kept, *choice, 0], len(kept)) for choice in ([3], long)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert tokens == (2, 7)


def test_a_bos_stays_at_the_beginning_of_a_prompt_that_is_cut(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.bos_token = "w39"
    front = processors.TemplateProcessing(single="w39 $A", special_tokens=[("w39", 39)])
    tokenizer.backend_tokenizer.post_processor = front
    row = Row("a:1", prompt="w1 w2 w3 w4 w5", choices=(" w6", " w7 w8"))
    found, _ = choose(model, tokenizer, row, max_length=6)
    expected = [-reference(model, [39, 4, 5, *choice, 0], 3) for choice in ([6], [7, 8])]
    assert found == pytest.approx(expected, rel=1e-5)


def test_choices_are_compared_by_sum_or_by_mean_over_tokens_or_bytes() -> None:
    scores = ChoiceScores((-4.0, -5.0, -6.0), (2, 4, 3), (2, 6, 18))
    assert scores.best == scores.likeliest("sum") == 0
    assert scores.likeliest("token") == 1
    assert scores.likeliest("byte") == 2
    assert set(CHOICE_NORMALIZATIONS) == {"sum", "token", "byte"}


def test_bytes_are_those_of_utf_8(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row("a:1", prompt="w1", choices=(" w2", " w3 w4"))
    [found] = choice_log_likelihoods(model, tokenizer, [row], max_length=32)
    assert found.target_bytes == (3, 6)


def test_the_spaces_of_the_answer_are_put_around_all_choices() -> None:
    def trained(answer: str | None, *choices: str) -> tuple[str, ...]:
        return choices_as_trained(Row("a:1", prompt="q", completion=answer, choices=choices))

    assert trained(" yes", "yes", "no") == (" yes", " no")
    assert trained("\nyes \n", "yes", " no ") == ("\nyes \n", "\nno \n")
    assert trained("yes", " yes", " no") == ("yes", "no")
    assert trained(" yes", " yes", "no") == (" yes", "no")  # one of them word for word
    assert trained(None, "yes", "no") == trained("other", "yes", "no") == ("yes", "no")


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ((" w2", " w3", " w2"), "its choices ' w2' and ' w2' are the same tokens"),
        ((" w2", " w3 w4 w5 w6 w7"), "its choice ' w3 w4 w5 w6 w7' has 6 tokens, and max_length = 6 has room for 5"),
    ],
)
def test_choices_that_cannot_be_told_apart_or_do_not_fit_are_named(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, choices: tuple[str, ...], expected: str
) -> None:
    row = Row("a:1", prompt="w1 w9", choices=choices)
    with pytest.raises(DataError) as caught:
        choice_log_likelihoods(model, tokenizer, [row, dataclasses.replace(row, origin="a:2")], max_length=6)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == ["a:1", "a:2"]
    assert expected in caught.value.problems[0]
