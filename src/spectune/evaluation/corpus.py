"""BLEU and chrF from sufficient statistics: integers of one row each, which add up over any rows.

So a corpus score of all rows, of a part of them, or of a bootstrap's draw is a sum and a formula; nothing is counted
twice. The counts are sacrebleu's, with its standard settings.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from spectune.evaluation.scripts import composed

#: metrics whose value over rows is no mean of the rows' values
CORPUS_METRICS = ("bleu", "chrf")


def corpus_statistics(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "13a"
) -> list[list[int]]:
    """The statistics of each prediction; texts are compared in Unicode's form NFC, without outer white space.

    `bleu`: length, closest reference's length, matches of 1- to 4-grams, 1- to 4-grams there are (10 numbers).
    `chrf`: of each order from 1 to 6 the prediction's n-grams, the reference's, and those in common, for the reference
    that scores best (18 numbers).

    Args:
        tokenizer: sacrebleu's, for BLEU (see `spectune.evaluation.scripts.bleu_tokenizer`).
    """
    # sacrebleu wants the first references of all, then the second ones, ...; None where a row has no more
    streams = [list(stream) for stream in zip_longest(*([composed(text) for text in texts] for texts in references))]
    written = [composed(text) for text in predictions]
    found = _sacrebleu(name, tokenizer)._extract_corpus_statistics(written, streams)
    return [[int(count) for count in row] for row in found]


def corpus_score(name: str, summed: Sequence[int]) -> float:
    """sacrebleu's score, 0 to 100, of the rows whose statistics were summed."""
    return float(_sacrebleu(name)._compute_score_from_stats([int(count) for count in summed]).score)


def _sacrebleu(name: str, tokenizer: str = "13a") -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # model output is not tokenised text: sacrebleu's warning about a final " ." does not apply
    return BLEU(force=True, tokenize=tokenizer) if name == "bleu" else CHRF()
