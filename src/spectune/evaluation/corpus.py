"""BLEU and chrF from sufficient statistics: integers of one row each, which add up over any rows.

So a corpus score of all rows, of a part of them, or of a bootstrap's draw is a sum and a formula; nothing is counted
twice. The counts are sacrebleu's, with its standard settings.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

#: metrics whose value over rows is no mean of the rows' values
CORPUS_METRICS = ("bleu", "chrf")


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


def _sacrebleu(name: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # model output is not tokenised text: sacrebleu's warning about a final " ." does not apply
    return BLEU(force=True) if name == "bleu" else CHRF()
