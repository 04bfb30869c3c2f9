"""What a tuned model is worth: its loss on rows, metrics of what it writes, and what it forgot of its base."""

from spectune.evaluation.choices import common_answers
from spectune.evaluation.corpus import CORPUS_METRICS, corpus_score, corpus_statistics
from spectune.evaluation.custom import CustomMetric, load_metric
from spectune.evaluation.divergence import KeptLogits, passage_kls, sample_passages
from spectune.evaluation.judge_rows import judge
from spectune.evaluation.judged import JudgedRow, corpus_metrics, judged_loss, loss_by_source, read_rows, write_rows
from spectune.evaluation.losses import RowLosses, row_losses
from spectune.evaluation.metrics import perplexity
from spectune.evaluation.questions import Questions
from spectune.evaluation.task import METRICS, Task

__all__ = [
    "CORPUS_METRICS",
    "METRICS",
    "CustomMetric",
    "JudgedRow",
    "KeptLogits",
    "Questions",
    "RowLosses",
    "Task",
    "common_answers",
    "corpus_metrics",
    "corpus_score",
    "corpus_statistics",
    "judge",
    "judged_loss",
    "load_metric",
    "loss_by_source",
    "passage_kls",
    "perplexity",
    "read_rows",
    "row_losses",
    "sample_passages",
    "write_rows",
]  # fmt: skip
