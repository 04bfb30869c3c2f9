"""A model judged on rows: for each its loss, and the metrics of what was written or chosen; kept as `rows.jsonl`."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spectune.data import Row, encode, prompt_ids
from spectune.errors import ConfigError, DataError
from spectune.evaluation.metrics import exact_match, rouge_l
from spectune.evaluation.task import CHOSEN, Task, references
from spectune.inference import choice_log_likelihoods, generate_texts, row_loss_sums
from spectune.storage import atomic_write_text
from spectune.storage.strict_json import strict_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("spectune")
T = TypeVar("T")

#: written completions may be so much longer than the longest reference, in tokens, and never longer than this
ROOM, MOST_NEW_TOKENS = 1.25, 256


@dataclass(frozen=True)
class JudgedRow:
    """One row: a line of `rows.jsonl`.

    Attributes:
        loss_sum, target_tokens: nats over the row's target tokens; a long text's windows together.
        metrics: values whose mean over rows is the metric.
        statistics: of corpus metrics (bleu, chrf), summed over rows to become one: sacrebleu's, in its order.
        prediction: what was written, or chosen; None where nothing was.
    """

    row: int
    origin: str
    loss_sum: float
    target_tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, list[float]] = field(default_factory=dict)
    prompt: str | None = None
    prediction: str | None = None
    references: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> JudgedRow:
        return cls(**{**fields, "references": tuple(fields.get("references", ()))})


def judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[JudgedRow]:
    """Judge the model under its current route. Rows that `encode` drops are left out.

    Raises:
        ConfigError: a custom metric fails or gives no finite number; names the row.
        DataError: no row has a target token.
    """
    examples = encode(task.rows, tokenizer, max_length=task.max_length, separator=task.separator).examples
    pad = tokenizer.pad_token_id
    sums, counts = _halving(
        lambda size: row_loss_sums(model, examples, pad if isinstance(pad, int) else 0, size), task.batch_size
    )
    if sum(counts) == 0:
        raise DataError(f"{len(task.rows)} rows without a single target token; expected at least one to take a loss of")
    index_of = {id(row): index for index, row in enumerate(task.rows)}
    loss: dict[int, tuple[float, int]] = {}
    for example, total, count in zip(examples, sums, counts, strict=True):
        index = index_of[id(example.row)]
        before = loss.get(index, (0.0, 0))
        loss[index] = (before[0] + total, before[1] + count)
    written = _written(model, tokenizer, task)
    chosen = _chosen(model, tokenizer, task) if CHOSEN in task.metrics else {}
    judged = []
    for index, (total, count) in sorted(loss.items()):
        row = task.rows[index]
        extra = _scored(task, row, written[index]) if index in written else chosen.get(index, {})
        judged.append(JudgedRow(index, row.origin, total, count, **extra))
    return judged


def judged_loss(judged: Sequence[JudgedRow]) -> float:
    """Nats for each target token of all rows."""
    return math.fsum(row.loss_sum for row in judged) / sum(row.target_tokens for row in judged)


def corpus_metrics(judged: Sequence[JudgedRow]) -> dict[str, float]:
    """Each metric over the rows that have it: the mean, or the corpus score of the summed statistics."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for row in judged for name in row.metrics):
        values = [row.metrics[name] for row in judged if name in row.metrics]
        found[name] = math.fsum(values) / len(values)
    for name in dict.fromkeys(name for row in judged for name in row.statistics):
        summed = [
            sum(column)
            for column in zip(*(row.statistics[name] for row in judged if name in row.statistics), strict=True)
        ]
        found[name] = corpus_score(name, summed)
    return found


def corpus_score(name: str, summed: Sequence[float]) -> float:
    """BLEU or chrF (0 to 100) of statistics summed over rows."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    metric: Any = {"bleu": BLEU, "chrf": CHRF}[name]()
    return float(metric._compute_score_from_stats([int(value) for value in summed]).score)


def write_rows(path: str | Path, judged: Sequence[JudgedRow]) -> None:
    """Write `rows.jsonl`, atomically."""
    atomic_write_text(path, "".join(strict_json(row.to_dict(), indent=None) + "\n" for row in judged))


def read_rows(path: str | Path) -> list[JudgedRow]:
    """Read `rows.jsonl`. Raises DataError where it is damaged."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return [JudgedRow.from_dict(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read as judged rows: {error}") from error


def _written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[int, str]:
    """What the model writes for the task's rows: from exactly the ids that training saw before the target."""
    if not task.written:
        return {}
    rows = [task.rows[index] for index in task.written]
    prompts = [prompt_ids(row, tokenizer, task.separator) for row in rows]
    longest = max(
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for row in rows for text in references(row)
    )
    room = min(MOST_NEW_TOKENS, math.ceil(ROOM * longest) + 4)
    texts = _halving(
        lambda size: generate_texts(model, tokenizer, prompts, max_new_tokens=room, batch_size=size), task.batch_size
    )
    return dict(zip(task.written, (text.strip() for text in texts), strict=True))


def _scored(task: Task, row: Row, prediction: str) -> dict[str, Any]:
    """The metrics of one written row."""
    wanted = list(references(row))
    metrics: dict[str, float] = {}
    statistics: dict[str, list[float]] = {}
    for name in task.metrics:
        if name == "exact_match":
            metrics[name] = exact_match([prediction], [wanted])
        elif name == "rouge_l":
            metrics[name] = rouge_l([prediction], [wanted])
        elif name in ("bleu", "chrf"):
            statistics[name] = sentence_statistics(name, prediction, wanted)
        elif name in task.custom:
            metrics[name] = _custom(name, task, prediction, wanted, row)
    prompt = row.prompt if row.prompt is not None else str((row.messages or [{}])[0].get("content", ""))
    return {
        "metrics": metrics,
        "statistics": statistics,
        "prompt": prompt,
        "prediction": prediction,
        "references": tuple(wanted),
    }


def sentence_statistics(name: str, prediction: str, wanted: Sequence[str]) -> list[float]:
    """sacrebleu's sufficient statistics of one row; their sums over rows give its corpus score."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # model output is not tokenised text: BLEU's warning about a final " ." does not apply
    metric: Any = BLEU(force=True) if name == "bleu" else CHRF()
    streams = [list(stream) for stream in zip_longest(list(wanted))]
    [found] = metric._extract_corpus_statistics([prediction], streams)
    return [float(value) for value in found]


def _custom(name: str, task: Task, prediction: str, wanted: list[str], row: Row) -> float:
    fields = {"prompt": row.prompt, "completion": row.completion, "messages": row.messages, "label": row.label}
    try:
        value = float(task.custom[name](prediction, wanted, {**row.columns, **fields}))
    except Exception as error:
        raise ConfigError(f"metric {name} failed on {row.origin}: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise ConfigError(f"metric {name} gave {value} for {row.origin}; expected a finite number")
    return value


def _chosen(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[int, dict[str, Any]]:
    """The likeliest choice of each row."""
    rows = [
        row
        if row.choices and row.label is not None
        else dataclasses.replace(row, choices=task.choices, label=row.completion)
        for row in task.rows
    ]
    scores = _halving(
        lambda size: choice_log_likelihoods(
            model, tokenizer, rows, max_length=task.max_length, separator=task.separator, batch_size=size
        ),
        task.batch_size,
    )
    return {
        index: {
            "metrics": {CHOSEN: float(row.choices[score.best] == row.label)},
            "prompt": row.prompt,
            "prediction": row.choices[score.best],
            "references": (str(row.label),),
        }
        for index, (row, score) in enumerate(zip(rows, scores, strict=True))
    }


def _halving(work: Callable[[int], T], size: int) -> T:
    """`work(batch size)`, with half as many rows at a time whenever memory runs out; that is said."""
    import torch

    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2
        torch.cuda.empty_cache()
        log.warning("evaluation ran out of memory: %d rows at a time from here on", size)
