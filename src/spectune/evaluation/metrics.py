"""Metrics of one written row, 0 to 1, and perplexity; those of a whole corpus are in `corpus`. Texts are compared in
Unicode's form NFC and without outer white space."""

import math
from collections.abc import Sequence

from spectune.evaluation.scripts import composed, words


def perplexity(nats_per_token: float) -> float:
    """exp of the mean loss; infinite where that is too large for a float."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction is one of the references; else 0."""
    return float(composed(prediction) in map(composed, references))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, the best over the references.

    Words of any script, and signs, are those of `scripts.words`, not stemmed. Equal texts have 1; texts without a token
    in common have 0.
    """
    if exact_match(prediction, references):
        return 1.0
    written = words(prediction)
    return max(_lcs_f1(written, words(reference)) for reference in references)


def _lcs_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    from rapidfuzz.distance import LCSseq

    if not prediction or not reference:
        return 0.0
    # F1 = 2PR / (P + R) with P = common / prediction, R = common / reference
    return 2 * LCSseq.similarity(prediction, reference) / (len(prediction) + len(reference))
