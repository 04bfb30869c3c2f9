from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectune.evaluation import perplexity
from spectune.evaluation.metrics import _lcs_f1, exact_match, rouge_l


def test_perplexity() -> None:
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e6) == math.inf


def test_exact_match_takes_any_reference_and_ignores_outer_spaces() -> None:
    assert exact_match(" yes\n", ["yes", "y"]) == exact_match("no", ["n", "no "]) == 1.0
    assert exact_match("No", ["no"]) == 0.0


def test_rouge_l_by_hand() -> None:
    # Lin's example: police killed the gunman / police kill the gunman: LCS 3 of 4 and 4
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == 0.75
    # order counts: "the gunman kill police" shares only two in order
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == 0.5
    # the best reference counts, case and punctuation are not words
    assert rouge_l("A cat!", ["dog", "a cat."]) == 1.0
    assert rouge_l("x", ["y"]) == rouge_l("", ["a"]) == 0.0


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
