"""What a tuned model is worth: its loss on rows, metrics of what it writes, and what it forgot of its base."""

from spectune.evaluation.forgetting import forgetting_kl, passage_kls, sample_passages
from spectune.evaluation.losses import RowLosses, row_losses
from spectune.evaluation.metrics import (
    accuracy_over_choices,
    exact_match,
    perplexity,
    rouge_l,
    text_metrics,
)

__all__ = [
    "RowLosses",
    "accuracy_over_choices",
    "exact_match",
    "forgetting_kl",
    "passage_kls",
    "perplexity",
    "rouge_l",
    "row_losses",
    "sample_passages",
    "text_metrics",
]
