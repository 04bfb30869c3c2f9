"""One model, under its current route, on a task: every row's loss, and what it wrote or chose."""

import logging
import math
from collections import defaultdict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune import inference
from spectune.data import Encoded, encode, pad_token_id, prompt_ids
from spectune.errors import ConfigError
from spectune.evaluation.corpus import CORPUS_METRICS, corpus_statistics
from spectune.evaluation.judged import JudgedRow
from spectune.evaluation.losses import row_losses
from spectune.evaluation.metrics import exact_match, rouge_l
from spectune.evaluation.references import has_prompt, prompt_of, references_of
from spectune.evaluation.task import Task
from spectune.inference import ChoiceScores, choice_log_likelihoods, context_length, halving

log = logging.getLogger("spectune")

MOST_NEW_TOKENS = 256
_OF_ROW = {"exact_match": exact_match, "rouge_l": rouge_l}


def judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[JudgedRow]:
    """Measure every row of the task under the model's current route, in evaluation mode and without gradient.

    Rows are encoded as in training; a row with nothing to learn (a `text` of one token) is left out. Prompts are
    continued greedily with the KV cache from `prompt_ids`, the ids that training put before the target. A prompt that
    leaves no room within the length loses its beginning, as it does in training, which is logged.

    Raises:
        ConfigError: rows of the task's length have no room under this delta, or a custom metric fails.
        DataError: rows that cannot be encoded.
        OutOfMemoryError: not even one row at a time fits.
    """
    encoded = encode(task.rows, tokenizer, max_length=task.max_length, separator=task.separator)
    _check_room(model, encoded, task.max_length)
    losses = row_losses(model, encoded.examples, pad_token_id(tokenizer), task.batch_size)
    place_of = {id(row): place for place, row in enumerate(task.rows)}
    sums, targets = defaultdict[int, list[float]](list), defaultdict[int, int](int)
    for example, loss, count in zip(encoded.examples, losses.loss_sums, losses.target_tokens, strict=True):
        place = place_of[id(example.row)]  # a long text is several examples
        sums[place].append(loss)
        targets[place] += count

    metrics = defaultdict[int, dict[str, float]](dict)
    statistics = defaultdict[int, dict[str, list[int]]](dict)
    predictions: dict[int, str] = {}
    for place, best in zip(task.to_choose, _chosen(model, tokenizer, task), strict=True):
        row = task.rows[place]
        predictions[place] = row.choices[best]
        metrics[place]["accuracy"] = float(row.choices[best] == row.label)
    texts = _written(model, tokenizer, task)
    for place, text in zip(task.to_write, texts, strict=True):
        row, references = task.rows[place], references_of(task.rows[place])
        predictions[place] = text
        metrics[place] |= {name: _OF_ROW[name](text, references) for name in task.text_metrics if name in _OF_ROW}
        metrics[place] |= {metric.name: metric(text, references, row) for metric in task.custom}
    wanted = [references_of(task.rows[place]) for place in task.to_write]
    for name in CORPUS_METRICS:
        if name in task.text_metrics:
            for place, counts in zip(task.to_write, corpus_statistics(name, texts, wanted), strict=True):
                statistics[place][name] = counts
    found = []
    for place in sorted(sums):
        row = task.rows[place]
        references, prompt = (references_of(row), prompt_of(row)) if has_prompt(row) else ((), None)
        if place in task.to_choose and place not in task.to_write:
            references = (str(row.label),)
        found.append(
            JudgedRow(
                place, row.origin, math.fsum(sums[place]), targets[place], metrics[place], statistics[place], prompt,
                predictions.get(place), references,
            )
        )  # fmt: skip
    return found


def _check_room(model: PreTrainedModel, encoded: Encoded, length: int) -> None:
    limit = context_length(model)
    longest = max(encoded.examples, key=lambda example: len(example.input_ids))
    if limit is not None and len(longest.input_ids) > limit:
        raise ConfigError(
            f"{longest.row.origin} has {len(longest.input_ids)} tokens at max_length = {length}, and under this delta "
            f"the base takes {limit}: judge all models with max_length = {limit}"
        )


def _chosen(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[int]:
    """The likeliest choice of each row to choose for."""
    rows = [task.rows[place] for place in task.to_choose]
    if not rows:
        return []

    def score(size: int) -> list[ChoiceScores]:
        return choice_log_likelihoods(
            model, tokenizer, rows, max_length=task.max_length, separator=task.separator, batch_size=size
        )

    return [found.best for found in halving(score, task.batch_size, f"scoring the choices of {len(rows)} rows")]


def _written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[str]:
    """What the model writes for each row to write, without outer spaces."""
    rows = [task.rows[place] for place in task.to_write]
    if not rows:
        return []
    new = task.max_new_tokens
    if (
        new is None
    ):  # a quarter more than the longest reference: a model that goes on too long shows it, at a bounded price
        wanted = [reference for row in rows for reference in references_of(row)]
        longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in wanted)
        new = min(math.ceil(1.25 * longest) + 1, MOST_NEW_TOKENS)
    limit = min(task.max_length, context_length(model) or task.max_length)
    prompts = [prompt_ids(row, tokenizer, task.separator) for row in rows]
    # room for what is written, but at least half of the length for what it is written from
    kept = limit - min(new, limit // 2)
    if cut := sum(len(prompt) >= limit for prompt in prompts):
        log.warning("%d of %d prompts to write from lose their beginning: they fill %d tokens", cut, len(rows), limit)
    prompts = [prompt[-kept:] if len(prompt) >= limit else prompt for prompt in prompts]

    def write(size: int) -> list[str]:
        return inference.generate_texts(model, tokenizer, prompts, max_new_tokens=new, batch_size=size)

    return [text.strip() for text in halving(write, task.batch_size, f"writing {len(rows)} rows")]
