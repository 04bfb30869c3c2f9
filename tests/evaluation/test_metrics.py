from __future__ import annotations

import itertools
import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectune.evaluation import perplexity
from spectune.evaluation.metrics import _lcs_f1, exact_match, rouge_l
from spectune.evaluation.scripts import bleu_tokenizer, words


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
    # the best reference counts, case does not, a sign is a token
    assert rouge_l("A cat!", ["dog", "a cat!"]) == 1.0
    assert rouge_l("A cat!", ["dog", "a cat."]) == pytest.approx(2 / 3)
    assert rouge_l("x", ["y"]) == rouge_l("", ["a"]) == 0.0


#: one sign each to a reader: with a skin colour, and of three people
THUMB, FAMILY = "\U0001f44d\U0001f3fd", "\U0001f468\u200d\U0001f469\u200d\U0001f466"
#: two answers that a reader tells apart, and the F1 of their tokens
UNLIKE = [
    ("\U0001f44d", "\U0001f44e", 0.0), (THUMB, "\U0001f44d\U0001f3ff", 0.0), ("+", "-", 0.0),
    ("C", "C++", 1 / 2), ("-5", "5", 2 / 3), ("!", "?", 0.0), ("", "!", 0.0), ("की", "का", 0.0), ("में", "मे", 0.0),
    ("ที่", "ที", 0.0), ("ดี มาก", "ดี มิก", 4 / 7), ("東京都", "京都", 4 / 5), ("1.5", "15", 0.0),
    ("résumé", "resume", 0.0), ("\U0001f1e9\U0001f1ea", "\U0001f1eb\U0001f1f7", 0.0), ("\u200b", "", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "expected"), UNLIKE)
def test_answers_that_differ_have_less_than_1_in_every_script(one: str, other: str, expected: float) -> None:
    assert rouge_l(one, [other]) == rouge_l(other, [one]) == pytest.approx(expected)
    assert rouge_l(one, [one]) == rouge_l(other, [other]) == exact_match(one, [one]) == 1.0
    assert exact_match(one, [other]) == 0.0


@pytest.mark.parametrize("text", ["naïve café", "Ångström", "한국어", "がぎ", "ệ"])
def test_composed_and_decomposed_texts_are_equal(text: str) -> None:
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert composed != decomposed
    for metric in (exact_match, rouge_l):
        assert metric(composed, [decomposed]) == metric(decomposed, [composed]) == 1.0


@given(st.text(max_size=12), st.text(max_size=12))
def test_equal_texts_have_1_and_texts_without_a_common_token_0(one: str, other: str) -> None:
    equal = unicodedata.normalize("NFC", one.strip()) == unicodedata.normalize("NFC", other.strip())
    found = rouge_l(one, [other])
    assert 0 <= found <= 1
    if equal:
        assert found == 1.0
    elif not set(words(one)) & set(words(other)):
        assert found == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Can't stop: 3.14, a_b!", ["can't", "stop", ":", "3.14", ",", "a_b", "!"]),
        ("C++ -5", ["c", "+", "+", "-", "5"]),
        ("हिन्दी की", ["हिन्दी", "की"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("ดีที่", ["ดี", "ที่"]),
        ("東京タワー", ["東", "京", "タ", "ワ", "ー"]),
        ("한국어 말", ["한국어", "말"]),
        (f"{THUMB}{FAMILY}", [THUMB, FAMILY]),
        ("Straße\u200b\n x", ["strasse", "x"]),
    ],
)  # fmt: skip
def test_words_of_every_script(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (["Ada lives in Leeds."], "13a"),
        (["हिन्दी में"], "13a"),
        (["12 + 3", ""], "13a"),
        (["a long English sentence with one name, 東京", "and another one"], "13a"),
        (["他住在北京。", "OK"], "zh"),
        (["東京に住む"], "char"),
        (["เขาอยู่ที่นี่"], "char"),
        (["他住在北京", "เขาอยู่ที่นี่"], "char"),
    ],
)
def test_bleu_tokenizer_follows_the_scripts_of_the_references(references: list[str], expected: str) -> None:
    assert bleu_tokenizer(references) == expected


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
