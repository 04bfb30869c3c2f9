"""One model, under its current route, on a task: every row's loss, and what it wrote or chose."""

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune import inference
from spectune.data import Encoded, Row, pad_token_id
from spectune.errors import ConfigError
from spectune.evaluation.corpus import CORPUS_METRICS, corpus_statistics
from spectune.evaluation.judge_head import judge_head
from spectune.evaluation.judged import JudgedRow
from spectune.evaluation.label_scores import CLASS_METRICS
from spectune.evaluation.losses import RowLosses, row_losses
from spectune.evaluation.metrics import exact_match, rouge_l
from spectune.evaluation.questions import Questions
from spectune.evaluation.references import has_prompt, prompt_of, references_of
from spectune.evaluation.task import Task
from spectune.families import vocabulary_rows
from spectune.inference import ChoiceScores, choice_log_likelihoods, context_length, halving, stop_ids
from spectune.phases import Phases

log = logging.getLogger("spectune")

MOST_NEW_TOKENS = 256
#: of rows that a GPU writes together, prompts included: of an 8B model with grouped keys 4 GB of cache
TOKENS_AT_ONCE = 32_768
_OF_ROW = {"exact_match": exact_match, "rouge_l": rouge_l}


def judge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, *, questions: Questions | None = None,
    phases: Phases | None = None, losses: RowLosses | None = None,
) -> list[JudgedRow]:  # fmt: skip
    """Measure every row of the task under the model's current route, in evaluation mode and without gradient.

    Rows are encoded as in training; a row with nothing to learn (a `text` of one token) is left out. Prompts are
    continued greedily with the KV cache from the ids that training put before the target, cut as they were there, which
    is logged. What is compared: see `spectune.evaluation.asked`.

    Args:
        questions: of this task and tokenizer, for callers that judge many models.
        phases: is told where the time goes.
        losses: of these rows under this route, where they have just been taken; of other rows they are not used.

    Raises:
        ConfigError: rows of the task's length have no room under this delta, or a custom metric fails.
        DataError: rows that cannot be encoded.
        OutOfMemoryError: not even one row at a time fits.
    """
    phases = phases or Phases()
    with phases.of("judge"):
        questions = questions or Questions(task, tokenizer, vocabulary_rows(model))
        return _judge(model, questions, phases, losses)


def _judge(model: PreTrainedModel, questions: Questions, phases: Phases, losses: RowLosses | None) -> list[JudgedRow]:
    task, tokenizer, encoded = questions.task, questions.tokenizer, questions.encoded
    _check_room(model, encoded, task.max_length)
    if task.labels is not None:
        return judge_head(model, questions, task.labels, losses)
    if losses is None or losses.target_tokens != tuple(example.target_tokens for example in encoded.examples):
        losses = row_losses(model, encoded.examples, pad_token_id(tokenizer, questions.vocab_size), task.batch_size)
    place_of = {id(row): place for place, row in enumerate(task.rows)}
    sums, targets = defaultdict[int, list[float]](list), defaultdict[int, int](int)
    for example, loss, count in zip(encoded.examples, losses.loss_sums, losses.target_tokens, strict=True):
        place = place_of[id(example.row)]  # a long text is several examples
        sums[place].append(loss)
        targets[place] += count

    measured = [_Measured(row) for row in task.rows]
    for place, best in zip(task.to_choose, _chosen(model, tokenizer, task), strict=True):
        row, found = task.rows[place], measured[place]
        found.prediction, found.references = row.choices[best], (str(row.label),)
        found.metrics |= {"accuracy": float(row.choices[best] == row.label)} if "accuracy" in task.label_metrics else {}
        for name in CLASS_METRICS:
            if name in task.label_metrics:
                classes = sorted(row.choices)
                numbers = classes.index(str(row.label)), classes.index(row.choices[best])
                found.statistics[name] = [*map(float, numbers), float(len(classes))]
    if task.to_write:
        _write(model, questions, measured, phases)
    return [
        JudgedRow(
            place, found.row.origin, math.fsum(sums[place]), targets[place], found.metrics, found.statistics,
            prompt_of(found.row) if has_prompt(found.row) else None, found.prediction, found.references,
            found.row.source,
        )
        for place, found in enumerate(measured) if place in sums
    ]  # fmt: skip


@dataclass
class _Measured:
    """What was found of a row beside its loss."""

    row: Row
    metrics: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, list[float]] = field(default_factory=dict)
    prediction: str | None = None
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.references = references_of(self.row) if has_prompt(self.row) else ()


def _check_room(model: PreTrainedModel, encoded: Encoded, length: int) -> None:
    limit = context_length(model)
    longest = max(encoded.examples, key=lambda example: example.length)
    if limit is not None and longest.length > limit:
        raise ConfigError(
            f"{longest.row.origin} has {longest.length} tokens at max_length = {length}, and under this delta "
            f"the base takes {limit}: judge all models with max_length = {limit}"
        )


def _chosen(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[int]:
    """The likeliest choice of each row to choose for."""
    rows = [task.rows[place] for place in task.to_choose]
    if not rows:
        return []

    def score(size: int) -> list[ChoiceScores]:
        return choice_log_likelihoods(
            model, tokenizer, rows, max_length=task.max_length, batch_size=size, **task.conventions
        )

    scores = halving(score, task.batch_size, f"scoring the choices of {len(rows)} rows")
    return [found.likeliest(task.choice_normalization) for found in scores]


def _write(model: PreTrainedModel, questions: Questions, measured: Sequence[_Measured], phases: Phases) -> None:
    """What the model writes for each row to write, and its metrics."""
    task, tokenizer = questions.task, questions.tokenizer
    length = min(task.max_length, context_length(model) or task.max_length)
    asked = questions.asked(stop_ids(model, tokenizer), length)
    if cut := sum(one.cut for one in asked):
        counts = cut, len(asked), length
        log.warning("%d of %d prompts to write from are cut: with an answer they exceed %d tokens", *counts)
    new = task.max_new_tokens or new_tokens(max(one.tokens for one in asked))
    prompts = [one.prompt for one in asked]

    def write(size: int) -> list[str]:
        return inference.generate_texts(model, tokenizer, prompts, max_new_tokens=new, batch_size=size)

    at_once = rows_at_once(model.device.type, max(map(len, prompts)) + new, task.batch_size)
    with phases.of("generate"):
        written = halving(write, at_once, f"writing {len(asked)} rows")
    texts = [one.text(text) for one, text in zip(asked, written, strict=True)]
    for place, text, one in zip(task.to_write, texts, asked, strict=True):
        found = measured[place]
        found.prediction, found.references = text, one.references
        found.metrics |= {name: _OF_ROW[name](text, one.references) for name in task.text_metrics if name in _OF_ROW}
        found.metrics |= {metric.name: metric(text, one.references, found.row) for metric in task.custom}
    references = [one.references for one in asked]
    for name in CORPUS_METRICS:
        if name in task.text_metrics:
            statistics = corpus_statistics(name, texts, references, task.bleu_tokenizer)
            for place, of_row in zip(task.to_write, statistics, strict=True):
                measured[place].statistics[name] = [*of_row]


def rows_at_once(device_type: str, length: int, batch_size: int) -> int:
    """How many rows of prompt and answer, of `length` tokens at most, are written together. A token takes a GPU about
    as long for 64 rows as for 16: it reads all weights once for each."""
    return max(batch_size, TOKENS_AT_ONCE // length) if device_type == "cuda" else batch_size


def new_tokens(longest: int) -> int:
    """How many tokens a model may write where the longest answer has `longest`: a quarter more, so that one which goes
    on too long shows it at a bounded price (256), and never less than one more than that answer."""
    return max(longest + 1, min(math.ceil(1.25 * longest) + 1, MOST_NEW_TOKENS))
