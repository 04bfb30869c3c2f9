from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from spectune.comparing.judging.statistics import bleu, chrf
from spectune.evaluation import CORPUS_METRICS, corpus_score, corpus_statistics

PREDICTIONS = ["the cat sat on the mat", "a dog ran over the road .", "", "Leeds", "one two three four five six"]
REFERENCES = [
    ["the cat sat on a mat", "a cat was on the mat", "there was a cat"],
    ["the dog ran over the road ."],
    ["nothing was said"],
    ["York", "Leeds"],
    ["six five four three two one", "one two three four five six seven eight"],
]

#: of arrays of sums, as the bootstrap takes them
ARRAYS = {"bleu": bleu, "chrf": chrf}

text = st.lists(st.sampled_from(["a", "b", "cat", "dog", ".", "x-y"]), max_size=7).map(" ".join)
corpus = st.lists(st.tuples(text, st.lists(text.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=5)


def official(name: str, predictions: list[str], references: list[list[str]]) -> float:
    longest = max(map(len, references))
    streams: Any = [[refs[k] if k < len(refs) else None for refs in references] for k in range(longest)]
    score = sacrebleu.corpus_bleu if name == "bleu" else sacrebleu.corpus_chrf
    return float(score(predictions, streams, **({"force": True} if name == "bleu" else {})).score)


def total(name: str, predictions: list[str], references: list[list[str]]) -> list[int]:
    return [sum(column) for column in zip(*corpus_statistics(name, predictions, references), strict=True)]


@pytest.mark.parametrize("name", CORPUS_METRICS)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [0], [1, 2], [2], [3], [0, 0, 4]])
def test_sums_give_sacrebleus_score_exactly_for_any_rows(name: str, rows: list[int]) -> None:
    """Several references, unequally many; an empty prediction; rows drawn twice, as a bootstrap does."""
    of_rows = corpus_statistics(name, PREDICTIONS, REFERENCES)
    summed = [sum(of_rows[row][k] for row in rows) for k in range(len(of_rows[0]))]
    expected = official(name, [PREDICTIONS[row] for row in rows], [REFERENCES[row] for row in rows])
    assert corpus_score(name, summed) == expected


@pytest.mark.parametrize("name", CORPUS_METRICS)
@settings(deadline=None, max_examples=60)
@given(rows=corpus)
def test_sums_and_arrays_of_sums_equal_sacrebleu(name: str, rows: list[tuple[str, list[str]]]) -> None:
    predictions, references = [row[0] for row in rows], [row[1] for row in rows]
    summed = total(name, predictions, references)
    expected = official(name, predictions, references)
    assert corpus_score(name, summed) == expected
    assert float(ARRAYS[name](np.array(summed, dtype=float))) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", CORPUS_METRICS)
def test_many_draws_at_once(name: str) -> None:
    counts = np.array(corpus_statistics(name, PREDICTIONS, REFERENCES))
    draws = np.random.default_rng(0).integers(0, 5, (3, 4, 5))
    found = ARRAYS[name](counts[draws].sum(axis=2).astype(float))
    assert found.shape == (3, 4)
    expected = [
        [official(name, [PREDICTIONS[i] for i in draw], [REFERENCES[i] for i in draw]) for draw in some]
        for some in draws
    ]
    assert found.tolist() == [pytest.approx(row, rel=1e-12) for row in expected]
    assert len({round(score, 3) for row in expected for score in row}) > 6


def test_the_layout_of_the_statistics() -> None:
    bleu = BLEU(force=True).corpus_score(PREDICTIONS[:1], [REFERENCES[0][:1]])
    [counts] = corpus_statistics("bleu", PREDICTIONS[:1], [REFERENCES[0][:1]])
    assert counts == [bleu.sys_len, bleu.ref_len, *bleu.counts, *bleu.totals]
    [counts] = corpus_statistics("chrf", ["abc"], [["abd"]])
    # characters a b of three; a pair ab of two; no triple; and nothing longer
    assert counts == [3, 3, 2, 2, 2, 1, 1, 1, 0] + [0] * 9
    assert CHRF().corpus_score(["abc"], [["abd"]]).score == corpus_score("chrf", counts)


@pytest.mark.parametrize("name", CORPUS_METRICS)
def test_composed_and_decomposed_texts_count_alike(name: str) -> None:
    text = "le café est à côté du château"
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert corpus_score(name, total(name, [composed], [[decomposed]])) == pytest.approx(100)
    assert corpus_statistics(name, [composed], [[composed]]) == corpus_statistics(name, [decomposed], [[decomposed]])


@pytest.mark.parametrize(
    ("tokenizer", "text", "other"),
    [("zh", "他住在北京的郊区。", "他住在上海的郊区。"), ("char", "彼は東京に住む", "彼は京都に住む")],
)
def test_bleu_of_scripts_without_spaces_sees_more_than_one_word(tokenizer: str, text: str, other: str) -> None:
    [counts] = corpus_statistics("bleu", [text], [[other]], tokenizer)
    official = sacrebleu.corpus_bleu([text], [[other]], tokenize=tokenizer, force=True)
    assert corpus_score("bleu", counts) == official.score
    assert 10 < official.score < 90
    assert corpus_score("bleu", corpus_statistics("bleu", [text], [[other]])[0]) == 0
