"""Metrics of written text and of choices. Shares lie in 0 to 1; BLEU and chrF in 0 to 100, as their papers do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from spectune.errors import DataError
from spectune.evaluation.corpus import CORPUS_METRICS, corpus_score, corpus_statistics
from spectune.inference import ChoiceScores

References = Sequence[Sequence[str]]


def perplexity(nats_per_token: float) -> float:
    """exp of the mean loss; infinite where that is too large for a float."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def exact_match(predictions: Sequence[str], references: References) -> float:
    """The share of predictions that equal one of their references, spaces at both ends aside."""
    return _mean(exact_match_of_row, predictions, references)


def rouge_l(predictions: Sequence[str], references: References) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, the best over a prediction's references,
    averaged over predictions. Words are runs of letters and digits, lower case, not stemmed."""
    return _mean(rouge_l_of_row, predictions, references)


def exact_match_of_row(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction is one of the references, spaces at both ends aside; else 0."""
    return float(prediction.strip() in {reference.strip() for reference in references})


def rouge_l_of_row(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L of one prediction, see `rouge_l`."""
    words = _words(prediction)
    return max(_lcs_f1(words, _words(reference)) for reference in references)


def text_metrics(predictions: Sequence[str], references: References) -> dict[str, float]:
    """`exact_match` and `rouge_l` (0 to 1), corpus `bleu` (Papineni et al. 2002) and `chrf` (Popovic 2015; 0 to 100),
    the last two by sacrebleu with its standard settings.

    Args:
        references: one or more for each prediction, not necessarily equally many.

    Raises:
        DataError: no prediction, unequal lengths, or a prediction without references.
    """
    found = {"exact_match": exact_match(predictions, references), "rouge_l": rouge_l(predictions, references)}
    for name in CORPUS_METRICS:
        rows = corpus_statistics(name, predictions, references)
        found[name] = corpus_score(name, [sum(counts) for counts in zip(*rows, strict=True)])
    return found


def accuracy_over_choices(
    scores: Sequence[ChoiceScores],
    choices: Sequence[Sequence[str]],
    labels: Sequence[str | None],
    *,
    per_token: bool = False,
) -> float:
    """The share of rows whose likeliest choice is the label.

    Args:
        scores: from `spectune.inference.choice_log_likelihoods`, one for each row.
        choices, labels: of the same rows; a label is one of its row's choices, word for word.
        per_token: compare likelihood per token, which does not favour short choices.

    Raises:
        DataError: no row, or labels that are not among the choices, all listed at once.
    """
    if not (len(scores) == len(choices) == len(labels)) or not scores:
        raise DataError(
            f"{len(scores)} scores, {len(choices)} lists of choices, {len(labels)} labels; "
            "expected equally many and at least one"
        )
    problems = [
        f"row {number}: label {label!r} is not among its choices; expected one of {list(options)}"
        for number, (options, label) in enumerate(zip(choices, labels, strict=True), start=1)
        if label not in options
    ]
    if problems:
        raise DataError("labels that are no choice", problems)
    hits = sum(
        options[score.best_per_token if per_token else score.best] == label
        for score, options, label in zip(scores, choices, labels, strict=True)
    )
    return hits / len(scores)


def _mean(of_row: Callable[[str, Sequence[str]], float], predictions: Sequence[str], references: References) -> float:
    _check(predictions, references)
    return sum(map(of_row, predictions, references)) / len(predictions)


def _check(predictions: Sequence[str], references: References) -> None:
    if len(predictions) != len(references) or not predictions:
        raise DataError(
            f"{len(predictions)} predictions and {len(references)} lists of references; "
            "expected equally many and at least one"
        )
    bare = [f"row {number}: no references" for number, wanted in enumerate(references, start=1) if not wanted]
    if bare:
        raise DataError("predictions need at least one reference each", bare)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


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
    common = lengths[-1]
    # F1 = 2PR / (P + R) with P = common / prediction, R = common / reference
    return 2 * common / (len(prediction) + len(reference))
