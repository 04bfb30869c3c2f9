"""BLEU and chrF from sufficient statistics: integers of one row each, which add up over any rows.

So a corpus score of all rows, of a part of them, or of a bootstrap's draw is a sum and a formula; nothing is counted
twice. The counts are sacrebleu's, with its standard settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: metrics whose value over rows is no mean of the rows' values
CORPUS_METRICS = ("bleu", "chrf")
_ORDERS = 4
_BETA = 2.0


def corpus_statistics(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[int]]:
    """The statistics of each prediction.

    `bleu`: length, closest reference's length, matches of 1- to 4-grams, 1- to 4-grams there are (10 numbers).
    `chrf`: of each order from 1 to 6 the prediction's n-grams, the reference's, and those in common, for the reference
    that scores best (18 numbers).
    """
    # sacrebleu wants the first references of all, then the second ones, ...; None where a row has no more
    streams = [list(stream) for stream in zip_longest(*references)]
    found = _sacrebleu(name)._extract_corpus_statistics(list(predictions), streams)
    return [[int(count) for count in row] for row in found]


def corpus_score(name: str, summed: Sequence[int]) -> float:
    """sacrebleu's score, 0 to 100, of the rows whose statistics were summed."""
    return float(_sacrebleu(name)._compute_score_from_stats([int(count) for count in summed]).score)


def corpus_scores(name: str, summed: ArrayLike) -> NDArray[np.float64]:
    """The same for many sums at once: `[..., 10]` (bleu) or `[..., 18]` (chrf) to `[...]`, but for rounding."""
    counts = np.asarray(summed, dtype=np.float64)
    return _bleu(counts) if name == "bleu" else _chrf(counts)


def _sacrebleu(name: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # model output is not tokenised text: sacrebleu's warning about a final " ." does not apply
    return BLEU(force=True) if name == "bleu" else CHRF()


def _bleu(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Papineni et al. 2002, with sacrebleu's smoothing "exp": the k-th order without a match counts 1 / 2^k matches."""
    length, wanted = counts[..., 0], counts[..., 1]
    matches, total = counts[..., 2 : 2 + _ORDERS], counts[..., 2 + _ORDERS :]
    none = matches == 0
    smoothed = np.where(none, 0.5 ** np.cumsum(none, axis=-1), matches)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(smoothed / total).mean(axis=-1)
        penalty = np.where(length < wanted, np.exp(1 - wanted / length), 1.0)
    # no match at all, or an order without a single n-gram, is 0
    defined = (matches > 0).any(axis=-1) & (total > 0).all(axis=-1)
    return np.where(defined, 100 * penalty * np.exp(np.where(defined, logs, 0.0)), 0.0)


def _chrf(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Popovic 2015: F-score with beta 2 of precision and recall, each averaged over the orders that both sides have."""
    predicted, wanted, common = counts[..., 0::3], counts[..., 1::3], counts[..., 2::3]
    used = (predicted > 0) & (wanted > 0)
    orders = np.maximum(used.sum(axis=-1), 1)
    precision = np.divide(common, predicted, out=np.zeros_like(common), where=used).sum(axis=-1) / orders
    recall = np.divide(common, wanted, out=np.zeros_like(common), where=used).sum(axis=-1) / orders
    below = _BETA**2 * precision + recall
    above = (1 + _BETA**2) * precision * recall
    score: NDArray[np.float64] = 100 * np.divide(above, below, out=np.zeros_like(below), where=below > 0)
    return score
