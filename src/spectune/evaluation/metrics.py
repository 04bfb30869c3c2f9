"""Metrics of one written row, 0 to 1, and perplexity; those of a whole corpus are in `corpus`."""

import math
import re
from collections.abc import Sequence


def perplexity(nats_per_token: float) -> float:
    """exp of the mean loss; infinite where that is too large for a float."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction is one of the references, spaces at both ends aside; else 0."""
    return float(prediction.strip() in {reference.strip() for reference in references})


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, the best over the references. Words are runs
    of letters and digits, lower case, not stemmed."""
    words, *wanted = (re.findall(r"[^\W_]+", text.lower()) for text in (prediction, *references))
    return max(_lcs_f1(words, reference) for reference in wanted)


def _lcs_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    if not prediction or not reference:
        return float(list(prediction) == list(reference))
    lengths = [0] * (len(reference) + 1)
    for word in prediction:
        diagonal = 0
        for column, other in enumerate(reference, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    # F1 = 2PR / (P + R) with P = common / prediction, R = common / reference
    return 2 * lengths[-1] / (len(prediction) + len(reference))
