"""Intervals, tests and metrics against independent references: closed forms, scipy, sacrebleu."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from scipy import stats

from spectune.comparing.judging.statistics import bleu, chrf, estimate, holm, ratio

Array = NDArray[np.float64]


def losses(
    random: np.random.Generator, levels: list[float], *, seeds: int = 3, rows: int = 200, noise: float = 0.005
) -> dict[str, Array]:
    """Sums of arms of one base on the same rows; each run's level has a noise of its own."""
    tokens = random.integers(5, 40, rows).astype(float)
    hard = random.lognormal(0, 0.4, rows)
    arms = {}
    for number, level in enumerate(levels):
        runs = level * (1 + noise * random.standard_normal((seeds, 1)))
        loss = hard * runs * (1 + 0.05 * random.standard_normal((seeds, rows)))
        arms[f"arm{number}"] = np.stack([loss * tokens, np.broadcast_to(tokens, loss.shape)], axis=-1)
    return arms


def test_one_seed_is_the_paired_t_test_on_rows() -> None:
    random = np.random.default_rng(0)
    one, two = random.normal(1.0, 0.3, 400), random.normal(1.0, 0.3, 400)
    two += 0.5 * one + 0.02
    sums = {name: np.stack([values, np.ones(400)], axis=-1)[None] for name, values in (("a", one), ("b", two))}
    arms, (pair,) = estimate(sums)
    wanted = stats.ttest_rel(two, one)
    low, high = wanted.confidence_interval(0.95)
    assert pair.difference == pytest.approx(float((two - one).mean()))
    assert (pair.low, pair.high) == pytest.approx((float(low), float(high)), rel=0.05)
    assert pair.p == pytest.approx(float(wanted.pvalue), abs=0.02)
    assert pair.effect_size == pytest.approx(float((two - one).mean() / (two - one).std(ddof=1)), rel=0.05)
    half = float(stats.t.ppf(0.975, 399) * one.std(ddof=1) / 20)
    assert (arms[0].low, arms[0].high) == pytest.approx((one.mean() - half, one.mean() + half), rel=0.01)


def test_seeds_alone_are_students_t_test() -> None:
    """Rows without noise of their own leave the noise of seeds: two arms alone make the classic pooled test, whose
    variance is then not below either arm's own."""
    levels = np.array([[1.00, 1.01, 1.02], [1.05, 1.06, 1.07]])
    sums = {name: np.stack([np.tile(values[:, None], 50), np.ones((3, 50))], axis=-1) for name, values in
            zip("ab", levels, strict=True)}  # fmt: skip
    _, (pair,) = estimate(sums)
    wanted = stats.ttest_ind(levels[1], levels[0])
    low, high = wanted.confidence_interval(0.95)
    assert pair.p == pytest.approx(float(wanted.pvalue), rel=1e-3)
    assert (pair.low, pair.high) == pytest.approx((float(low), float(high)), rel=1e-3)


def test_ratio_estimator_has_the_delta_methods_error() -> None:
    random = np.random.default_rng(1)
    tokens = random.integers(1, 60, 500).astype(float)
    total = tokens * random.normal(1.5, 0.5, 500) + random.normal(0, 2, 500)
    (arm,), pairs = estimate({"a": np.stack([total, tokens], axis=-1)[None]})
    mean = total.sum() / tokens.sum()
    error = (total - mean * tokens).std(ddof=1) / math.sqrt(500) / tokens.mean()
    assert pairs == []
    assert arm.mean == pytest.approx(mean)
    assert arm.high - arm.mean == pytest.approx(float(stats.t.ppf(0.975, 499)) * error, rel=0.05)


def test_intervals_cover_the_truth() -> None:
    """95% intervals of a known difference, over rows and seeds, cover it in about 95% of samples."""
    random = np.random.default_rng(2)
    hits = [
        pair.low <= 0.1 * math.exp(0.08) <= pair.high
        for _ in range(300)
        for pair in estimate(losses(random, [1.0, 1.1], rows=150), relative_noise=True, replicates=300)[1]
    ]
    assert 0.92 <= np.mean(hits) <= 0.995


def test_interaction_of_rows_and_seeds_is_counted_once() -> None:
    """With no noise but that of rows within runs, six runs of n rows are as good as the rows of all of them."""
    random = np.random.default_rng(3)
    rows = 2000
    runs = random.normal(1.0, 0.4, (2, 3, rows))
    sums = {name: np.stack([values, np.ones((3, rows))], axis=-1) for name, values in zip("ab", runs, strict=True)}
    reaches = []
    for _ in range(20):
        runs = random.normal(1.0, 0.4, (2, 3, rows))
        sums = {n: np.stack([values, np.ones((3, rows))], axis=-1) for n, values in zip("ab", runs, strict=True)}
        _, (pair,) = estimate(sums, replicates=400)
        reaches.append((pair.high - pair.low) / 2)
    known = 1.96 * 0.4 * math.sqrt(2 / (3 * rows))
    assert known * 0.95 < np.median(reaches) < known * 1.5  # counted twice it would be more than 1.41 with t above


def test_differs_is_when_the_interval_leaves_out_zero() -> None:
    random = np.random.default_rng(4)
    seen = set()
    for _ in range(30):
        levels = list(1 + 0.03 * random.random(5))
        for pair in estimate(losses(random, levels, rows=100), relative_noise=True, replicates=200)[1]:
            differs = pair.p_adjusted <= 0.05
            seen.add(differs)
            assert differs == (not pair.low <= 0 <= pair.high)
    assert seen == {True, False}


def test_holm() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005])
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # worked by hand
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])


def test_same_input_same_answer_and_another_seed_another() -> None:
    sums = losses(np.random.default_rng(5), [1.0, 1.02, 1.05])
    assert estimate(sums) == estimate(sums)
    assert estimate(sums, seed=1) != estimate(sums)


def test_equal_arms_do_not_differ() -> None:
    sums = losses(np.random.default_rng(6), [1.0])["arm0"]
    _, (pair,) = estimate({"a": sums, "b": sums.copy()})
    assert (pair.difference, pair.p, pair.p_adjusted) == (0.0, 1.0, 1.0)


def test_constant_measures_do_not_differ() -> None:
    sums = np.stack([np.zeros((3, 40)), np.ones((3, 40))], axis=-1)  # nothing ever matched
    arms, (pair,) = estimate({"a": sums, "b": sums.copy()})
    assert (pair.low, pair.high, pair.p, pair.effect_size) == (0.0, 0.0, 1.0, None)
    assert arms[0].seed_sd == 0.0


def test_an_arm_with_one_seed_takes_the_others_noise() -> None:
    random = np.random.default_rng(7)
    sums = losses(random, [1.0, 1.0, 1.0], noise=0.02)
    alone = {name: table[:1] for name, table in sums.items()}
    mixed = {**sums, "arm2": sums["arm2"][:1]}
    arms = {arm.name: arm for arm in estimate(mixed, relative_noise=True)[0]}
    only = {arm.name: arm for arm in estimate(alone, relative_noise=True)[0]}
    assert arms["arm2"].seed_sd is None
    assert arms["arm2"].high - arms["arm2"].low > only["arm2"].high - only["arm2"].low


def test_a_noisy_arms_own_variance_is_not_shrunk() -> None:
    random = np.random.default_rng(8)
    sums = losses(random, [1.0] * 6, noise=0.001)
    sums["noisy"] = losses(random, [1.0], noise=0.05)["arm0"]
    arms = {arm.name: arm for arm in estimate(sums)[0]}
    noisy = arms["noisy"]
    assert noisy.seed_sd is not None
    assert (noisy.high - noisy.low) / 2 > 1.96 * noisy.seed_sd / math.sqrt(3) * 0.99


@pytest.mark.parametrize("sums", [{"a": np.ones((1, 1, 2))}, {"a": np.ones((1, 4, 2)), "b": np.ones((1, 5, 2))}])
def test_rows_that_cannot_be_compared(sums: dict[str, Array]) -> None:
    with pytest.raises(ValueError, match="expected the same rows for all, and at least two"):
        estimate(sums)


HYPOTHESES = ["the cat sat on the mat", "a dog", "there is a house on the hill", "x", "", "it is what it is today"]
REFERENCES = [["the cat sat on a mat", "a cat sat"], ["the dog ran", "a dog"], ["a house on the hill", "house"],
              ["y", "z"], ["nothing", "none"], ["it was what it was", "today it is what it is"]]  # fmt: skip


@pytest.mark.parametrize(("metric", "score"), [(BLEU(force=True), bleu), (CHRF(), chrf)])
@pytest.mark.parametrize("rows", [slice(0, 6), slice(0, 1), slice(1, 2), slice(2, 4), slice(3, 5), slice(4, 5)])
def test_corpus_scores_are_sacrebleus(metric: Any, score: Any, rows: slice) -> None:
    hypotheses, references = HYPOTHESES[rows], REFERENCES[rows]
    streams = [list(stream) for stream in zip(*references, strict=True)]
    statistics = np.array(metric._extract_corpus_statistics(hypotheses, streams), dtype=float)
    wanted = metric.corpus_score(hypotheses, streams).score
    assert float(score(statistics.sum(axis=0))) == pytest.approx(wanted, abs=1e-9)
    assert score(np.stack([statistics.sum(axis=0)] * 2)).shape == (2,)


def test_ratio_of_nothing() -> None:
    assert ratio(np.array([[3.0, 2.0], [0.0, 0.0]])) == pytest.approx([1.5, math.nan], nan_ok=True)


def test_bleu_of_a_better_system_is_found_better() -> None:
    random = np.random.default_rng(9)

    def system(skill: float) -> Array:
        total = np.stack([random.integers(12, 20, (3, 300)) - order for order in range(4)], axis=-1)
        correct = random.binomial(total, skill ** np.arange(1, 5))
        lengths = np.repeat(total[..., :1], 2, axis=-1)
        return np.concatenate([lengths, correct, total], axis=-1).astype(float)

    arms, (pair,) = estimate({"worse": system(0.7), "better": system(0.8)}, bleu)
    assert arms[0].mean < arms[1].mean < 100
    assert pair.low > 0
    assert arms[0].mean == pytest.approx(np.mean([100 * math.exp(np.mean(np.log(0.7 ** np.arange(1, 5))))]), rel=0.05)


def test_ten_arms_take_less_than_two_seconds() -> None:
    sums = losses(np.random.default_rng(10), [1.0 + 0.01 * n for n in range(10)], rows=5000)
    estimate(losses(np.random.default_rng(10), [1.0, 1.1]))  # scipy's first call
    begin = time.process_time()
    estimate(sums, relative_noise=True)
    assert time.process_time() - begin < 2
