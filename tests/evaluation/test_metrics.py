from __future__ import annotations

import itertools
import math

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from spectune.errors import DataError
from spectune.evaluation import accuracy_over_choices, exact_match, perplexity, rouge_l, text_metrics
from spectune.evaluation.metrics import _lcs_f1
from spectune.inference import ChoiceScores


def test_perplexity() -> None:
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e6) == math.inf


def test_exact_match_takes_any_reference_and_ignores_outer_spaces() -> None:
    assert exact_match([" yes\n", "no", "No"], [["yes", "y"], ["n", "no "], ["no"]]) == pytest.approx(2 / 3)


def test_rouge_l_by_hand() -> None:
    # Lin's example: police killed the gunman / police kill the gunman: LCS 3 of 4 and 4
    assert rouge_l(["police kill the gunman"], [["police killed the gunman"]]) == 0.75
    # order counts: "the gunman kill police" shares only two in order
    assert rouge_l(["the gunman kill police"], [["police killed the gunman"]]) == 0.5
    # the best reference counts, rows are averaged, case and punctuation are not words
    assert rouge_l(["A cat!", "x"], [["dog", "a cat."], ["y"]]) == 0.5
    assert rouge_l([""], [["a"]]) == 0.0


def naive_lcs(a: list[str], b: list[str]) -> int:
    def is_subsequence(words: tuple[str, ...], of: list[str]) -> bool:
        rest = iter(of)
        return all(word in rest for word in words)

    return max(n for n in range(len(a) + 1) if any(is_subsequence(c, b) for c in itertools.combinations(a, n)))


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.lists(st.sampled_from("abc"), min_size=1, max_size=6)
)
def test_longest_common_subsequence_equals_the_definition(a: list[str], b: list[str]) -> None:
    common = naive_lcs(a, b)
    precision, recall = common / len(a), common / len(b)
    expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert _lcs_f1(a, b) == pytest.approx(expected)


def test_bleu_and_chrf_are_sacrebleus_with_references_of_unequal_number() -> None:
    predictions = ["the cat sat on the mat", "a dog ran over the road ."]
    references = [["the cat sat on a mat", "a cat was on the mat"], ["the dog ran over the road ."]]
    found = text_metrics(predictions, references)
    streams = [[refs[0] for refs in references], [references[0][1], None]]
    assert found["bleu"] == sacrebleu.corpus_bleu(predictions, streams, force=True).score
    assert found["chrf"] == sacrebleu.corpus_chrf(predictions, streams).score
    assert set(found) == {"exact_match", "rouge_l", "bleu", "chrf"}
    perfect = text_metrics(["a b c d e"], [["a b c d e"]])
    assert perfect == pytest.approx({"exact_match": 1.0, "rouge_l": 1.0, "bleu": 100.0, "chrf": 100.0})


def test_predictions_and_references_that_do_not_pair_are_errors() -> None:
    with pytest.raises(DataError, match="1 predictions and 2 lists"):
        exact_match(["a"], [["a"], ["b"]])
    with pytest.raises(DataError, match="0 predictions"):
        text_metrics([], [])
    with pytest.raises(DataError) as caught:
        rouge_l(["a", "b"], [["a"], []])
    assert caught.value.problems == ["row 2: no references"]


def test_accuracy_over_choices() -> None:
    scores = [ChoiceScores((-1.0, -2.0), (1, 4)), ChoiceScores((-3.0, -2.0), (1, 1))]
    choices, labels = [("yes", "no"), ("yes", "no")], ["no", "no"]
    assert accuracy_over_choices(scores, choices, labels) == 0.5
    assert accuracy_over_choices(scores, choices, labels, per_token=True) == 1.0
    with pytest.raises(DataError) as caught:
        accuracy_over_choices(scores, choices, ["maybe", None])
    assert len(caught.value.problems) == 2
    with pytest.raises(DataError, match="2 scores"):
        accuracy_over_choices(scores, choices, ["no"])
