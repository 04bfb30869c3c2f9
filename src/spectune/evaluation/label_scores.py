"""How well predictions agree with labels, from sums over rows: so one resampling of rows serves each of them.

Each score is a function of sums `[..., statistics]`, along the last axis; what a row adds is `row_sums`. Predictions
that do not vary have a correlation of 0, as scikit-learn has it; of labels that do not vary, as in some draws of few
rows, there is none: NaN, and 0 where a whole corpus is such.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: metrics of classes, whose statistics of a row are the number of its class, of the predicted one, and of all classes
CLASS_METRICS = ("macro_f1", "matthews")


def macro_f1(sums: Array) -> Array:
    """The mean of the classes' F1, 2 tp / (predicted + labelled), over those that labels or predictions have.

    `sums`: for each class how many were found, predicted and labelled, one after the other (3 x classes).
    """
    found, predicted, labelled = np.split(sums, 3, axis=-1)
    there = predicted + labelled > 0
    f1 = np.where(there, 2 * found / np.where(there, predicted + labelled, 1), 0.0)
    return np.asarray(f1.sum(axis=-1) / np.maximum(there.sum(axis=-1), 1))


def matthews(sums: Array) -> Array:
    """Matthews' correlation of any number of classes, R_K (Gorodkin 2004, eq. 8): -1 to 1. `sums` as in `macro_f1`."""
    found, predicted, labelled = np.split(sums, 3, axis=-1)
    rows = labelled.sum(axis=-1)
    covariance = found.sum(axis=-1) * rows - (predicted * labelled).sum(axis=-1)
    of_labels = rows**2 - (labelled**2).sum(axis=-1)
    return _correlation(covariance, rows**2 - (predicted**2).sum(axis=-1), of_labels)


def pearson(sums: Array) -> Array:
    """Pearson's correlation. `sums`: rows, x, y, x^2, y^2, x y, with the labels as y; centred, or what is left of them
    is rounding."""
    count, x, y, xx, yy, xy = (sums[..., place] for place in range(6))
    return _correlation(count * xy - x * y, count * xx - x**2, count * yy - y**2)


def _correlation(covariance: Array, spread: Array, of_labels: Array) -> Array:
    both = np.maximum(spread, 0) * np.maximum(of_labels, 0)
    found = np.where(both > 0, covariance / np.sqrt(np.where(both > 0, both, 1)), 0.0)
    return np.asarray(np.where(of_labels > 0, found, np.nan))


def span_f1(sums: Array) -> Array:
    """F1 of spans over all rows (micro average). `sums`: spans found (of the right type and words), predicted,
    labelled."""
    found, predicted, labelled = (sums[..., place] for place in range(3))
    there = predicted + labelled > 0
    return np.asarray(np.where(there, 2 * found / np.where(there, predicted + labelled, 1), 0.0))


def token_accuracy(sums: Array) -> Array:
    """The share of words with the right class, of all words. `sums`: right ones, words."""
    return np.asarray(sums[..., 0] / np.maximum(sums[..., 1], 1))


#: the scores of this file by their metrics' names
AGREEMENT: dict[str, Callable[[Array], Array]] = {
    "macro_f1": macro_f1, "matthews": matthews, "pearson": pearson, "span_f1": span_f1,
    "token_accuracy": token_accuracy,
}  # fmt: skip


def row_sums(name: str, statistics: Sequence[float], classes: int = 0) -> list[float]:
    """What a row with these statistics adds to the sums of a metric. `classes`: at least so many are counted."""
    if name not in CLASS_METRICS:
        return [float(value) for value in statistics]
    label, predicted, count = (int(value) for value in statistics)
    size = max(count, classes)
    sums = [0.0] * (3 * size)
    sums[label] = float(label == predicted)
    sums[size + predicted] = sums[2 * size + label] = 1.0
    return sums


def agreement(name: str, rows: Sequence[Sequence[float]]) -> float:
    """A metric over rows with these statistics."""
    found = float(AGREEMENT[name](np.array([row_sums(name, row) for row in rows]).sum(axis=0)))
    return 0.0 if np.isnan(found) else found


def pearson_statistics(values: Sequence[float], labels: Sequence[float]) -> list[list[float]]:
    """The statistics of each row, both sides centred and scaled by the labels, which changes no correlation."""
    centre = float(np.mean(labels))
    scale = float(np.std(labels)) or 1.0
    pairs = [((value - centre) / scale, (label - centre) / scale) for value, label in zip(values, labels, strict=True)]
    return [[1.0, x, y, x * x, y * y, x * y] for x, y in pairs]
