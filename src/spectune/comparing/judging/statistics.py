"""Which differences between methods are more than noise: intervals and tests over rows and seeds.

Every measure here is a function of sums over the judged rows: a loss is nats / target tokens, a metric is
points / rows, BLEU and chrF are functions of summed counts. So one resampling serves them all.

Two levels of noise (docs/statistics.md tells the model, the choices and their calibration):

- *rows*, by the bootstrap: rows are drawn with replacement, the same ones for every arm and seed (paired), and the
  measure is computed anew from their sums.
- *seeds*, by their variance: resampling three seeds has ten outcomes and loses a third of the variance, so the variance
  of an arm's seeds is added, moderated by that of all arms (Smyth 2004), with Student's t and Welch-Satterthwaite's
  degrees of freedom. What seeds and rows share (their interaction is in both terms) is taken off once.

Pairs are corrected for their number by Holm 1979.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

Array = NDArray[np.float64]
#: sums `[..., statistics]` -> the measure `[...]`
Score = Callable[[Array], Array]

REPLICATES = 2000
CONFIDENCE = 0.95
#: degrees of freedom that all arms' seeds lend to each arm's own. With two to eight arms of three seeds the number
#: cannot be estimated from them (Smyth's section 6.2 has thousands of genes); benchmarks/calibration.py chose it.
PRIOR_DEGREES = 4.0
#: replicates drawn at once: 250 x 5,000 weights are 5 MB
BLOCK = 250


@dataclass(frozen=True)
class ArmEstimate:
    """An arm's mean over seeds, its interval, and the standard deviation of one run over seeds (None of one seed)."""

    name: str
    seeds: int
    mean: float
    low: float
    high: float
    seed_sd: float | None


@dataclass(frozen=True)
class PairEstimate:
    """`difference` is b - a. `low` and `high` leave out zero exactly where Holm's correction finds a difference.

    `effect_size` is Cohen's d_z: the difference over the standard deviation of the paired differences between rows.
    """

    a: str
    b: str
    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float
    effect_size: float | None


def ratio(sums: Array) -> Array:
    """`[..., (total, count)]` -> total / count: a loss per token, a metric per row; NaN of a count of zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def bleu(sums: Array) -> Array:
    """Corpus BLEU (Papineni et al. 2002) from sacrebleu's sums `[system length, reference length, 4 correct, 4 total]`,
    with its standard smoothing: the k-th order without a match counts as 1 / 2^k matches."""
    system, reference = sums[..., 0], sums[..., 1]
    correct, total = sums[..., 2:6], sums[..., 6:10]
    missed = (correct == 0) & (total > 0)
    smoothed = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), correct)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(total > 0, smoothed / total, 0.0)
        brevity = np.exp(np.minimum(0.0, 1 - reference / system))
        score = 100 * brevity * np.exp(np.log(precision).mean(axis=-1))
    defined = (correct > 0).any(axis=-1) & (total > 0).all(axis=-1)
    return np.where(defined, score, 0.0)


def chrf(sums: Array) -> Array:
    """Corpus chrF2 (Popovic 2015) from sacrebleu's sums: for each order the counts in hypothesis, reference, both."""
    hypothesis, reference, both = (sums[..., start::3] for start in range(3))
    there = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(there.sum(axis=-1), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(there, both / hypothesis, 0.0).sum(axis=-1) / orders
        recall = np.where(there, both / reference, 0.0).sum(axis=-1) / orders
        score = 100 * 5 * precision * recall / (4 * precision + recall)
    return np.where(precision + recall > 0, score, 0.0)


def holm(p: Array) -> Array:
    """Holm's step-down adjusted p-values `[pairs]` (Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))), 1.0)
    return adjusted


def estimate(
    sums: Mapping[str, Array], score: Score = ratio, *, relative_noise: bool = False,
    confidence: float = CONFIDENCE, replicates: int = REPLICATES, seed: int = 0,
) -> tuple[list[ArmEstimate], list[PairEstimate]]:  # fmt: skip
    """Intervals for every arm and every pair of arms. The same input and seed give the same result.

    Args:
        sums: for each arm `[seeds, rows, statistics]`; the rows are the same and in the same order for all arms. What
            is not independent (rows with the same prompt) belongs into one row, summed.
        score: what turns sums over rows into the measure.
        relative_noise: seeds' noise is alike between arms as a share of the mean (losses), not in itself (accuracies).

    Raises:
        ValueError: arms with different rows, or fewer than two rows.
    """
    names = list(sums)
    rows = {array.shape[1] for array in sums.values()}
    if len(rows) != 1 or min(rows) < 2:
        raise ValueError(f"arms with {sorted(rows)} rows; expected the same rows for all, and at least two")
    runs = [score(array.sum(axis=1)) for array in sums.values()]
    means = np.array([values.mean() for values in runs])
    covariance, interaction = _row_noise(list(sums.values()), score, replicates, seed)
    noise = _seed_noise(runs, interaction, means if relative_noise else np.ones_like(means))
    count = rows.pop()
    arms = []
    for index, (name, mean) in enumerate(zip(names, means.tolist(), strict=True)):
        variance, degrees = _combined(float(covariance[index, index]), count - 1, noise, [index])
        reach = float(student_t.ppf((1 + confidence) / 2, degrees)) * variance**0.5
        sd = float(runs[index].std(ddof=1)) if len(runs[index]) > 1 else None
        arms.append(ArmEstimate(name, len(runs[index]), mean, mean - reach, mean + reach, sd))
    return arms, _pairs(names, means, covariance, noise, count, confidence) if len(names) > 1 else []


def _pairs(
    names: list[str], means: Array, covariance: Array, noise: _SeedNoise, rows: int, confidence: float
) -> list[PairEstimate]:
    """Every pair of arms, with Holm's correction. `covariance`: of the arms' means over samples of rows."""
    indices = list(combinations(range(len(names)), 2))
    differences = np.array([means[b] - means[a] for a, b in indices])
    row_parts = np.array([covariance[a, a] + covariance[b, b] - 2 * covariance[a, b] for a, b in indices]).clip(min=0)
    both = [_combined(float(part), rows - 1, noise, list(pair)) for part, pair in zip(row_parts, indices, strict=True)]
    errors, degrees_of = np.sqrt([variance for variance, _ in both]), np.array([degrees for _, degrees in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        statistics = np.where(differences == 0, 0.0, np.abs(differences) / errors)
        effects = differences / np.sqrt(row_parts * rows)
    p = 2 * student_t.sf(statistics, degrees_of)
    adjusted = holm(p)
    # Holm's own level of each pair: that of its step where it was rejected, of the step that stopped where not
    found = adjusted <= 1 - confidence
    steps = np.empty(len(p))
    steps[np.argsort(p, kind="stable")] = len(p) - np.minimum(np.arange(len(p)), found.sum())
    reaches = student_t.isf((1 - confidence) / steps / 2, degrees_of) * errors
    effect_sizes = [float(effect) if np.isfinite(effect) else None for effect in effects]
    columns = [column.tolist() for column in (differences, differences - reaches, differences + reaches, p, adjusted)]
    return [
        PairEstimate(names[a], names[b], *numbers)
        for (a, b), *numbers in zip(indices, *columns, effect_sizes, strict=True)
    ]


@dataclass(frozen=True)
class _SeedNoise:
    """For each arm: variance over seeds of one run, its degrees of freedom, the interaction's part of it, seeds."""

    variance: Array
    degrees: Array
    interaction: Array
    seeds: NDArray[np.int64]
    total_degrees: int


def _row_noise(sums: list[Array], score: Score, replicates: int, seed: int) -> tuple[Array, Array]:
    """Variance over samples of rows: of the arms' means `[arms, arms]`, and for each arm of what one seed's run does
    apart from the arm's mean (the interaction of rows and seeds, `[arms]`)."""
    sizes = [len(array) for array in sums]
    stacked = np.concatenate(sums)  # [runs, rows, statistics]
    runs, rows, statistics = stacked.shape
    table = np.ascontiguousarray(stacked.transpose(1, 0, 2).reshape(rows, runs * statistics), dtype=np.float32)
    random = np.random.default_rng(seed)
    drawn = []
    for start in range(0, replicates, BLOCK):
        block = min(BLOCK, replicates - start)
        picks = random.integers(rows, size=(block, rows)) + rows * np.arange(block)[:, None]
        weights = np.bincount(picks.ravel(), minlength=block * rows).reshape(block, rows).astype(np.float32)
        drawn.append(score((weights @ table).reshape(block, runs, statistics).astype(np.float64)))
    values = np.concatenate(drawn)  # [replicates, runs]
    values = values[np.isfinite(values).all(axis=1)]  # samples of rows without a single target token
    of_arm = np.split(values, np.cumsum(sizes)[:-1], axis=1)
    means = np.stack([part.mean(axis=1) for part in of_arm], axis=1)
    unbiased = rows / (rows - 1)  # the bootstrap's variance is that of a population of these rows
    apart = [
        (part - part.mean(axis=1, keepdims=True)).var(axis=0).mean() * part.shape[1] / max(part.shape[1] - 1, 1)
        for part in of_arm
    ]
    covariance = np.atleast_2d(np.cov(means, rowvar=False))
    return covariance * unbiased, np.array(apart) * unbiased


def _seed_noise(runs: list[Array], interaction: Array, scale: Array) -> _SeedNoise:
    """The variance of each arm's seeds: a weighted mean of its own and that of all arms, but never below its own, so
    that a method noisier than the others is not taken for a quiet one."""
    seeds = np.array([len(values) for values in runs])
    own_degrees = seeds - 1
    total = int(own_degrees.sum())
    scale = np.where(scale == 0, 1.0, np.abs(scale))
    own = np.array([values.var(ddof=1) if len(values) > 1 else 0.0 for values in runs]) / scale**2
    pooled = float((own * own_degrees).sum() / total) if total else 0.0
    prior = np.minimum(PRIOR_DEGREES, total - own_degrees)
    degrees = prior + own_degrees
    moderated = (prior * pooled + own_degrees * own) / np.maximum(degrees, 1)
    return _SeedNoise(np.maximum(moderated, own) * scale**2, degrees, interaction, seeds, total)


def _combined(rows_part: float, rows_degrees: int, noise: _SeedNoise, arms: list[int]) -> tuple[float, float]:
    """Variance and degrees of freedom (Welch 1947, Satterthwaite 1946) of a mean, or of a difference of two."""
    parts = noise.variance[arms] / noise.seeds[arms]
    seeds_part = float(parts.sum())
    shared = np.minimum(noise.interaction[arms] / noise.seeds[arms], parts)
    variance = rows_part + float((parts - shared).sum())
    if seeds_part == 0:
        return variance, float(rows_degrees)
    # the arms' moderated variances share what they borrow: together they know no more than all seeds do
    seeds_degrees = min(seeds_part**2 / float((parts**2 / noise.degrees[arms]).sum()), float(noise.total_degrees))
    degrees = variance**2 / (rows_part**2 / rows_degrees + seeds_part**2 / seeds_degrees)
    return variance, max(degrees, min(seeds_degrees, float(rows_degrees)))
