"""A model with a head on a task: every row's loss, what the head says of it, and how that agrees with the label."""

import json
import math
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from spectune.data import LabelledExample, Labels, pad_token_id
from spectune.evaluation.judged import JudgedRow
from spectune.evaluation.label_scores import CLASS_METRICS, pearson_statistics
from spectune.evaluation.losses import RowLosses, row_losses
from spectune.evaluation.questions import Questions
from spectune.evaluation.references import has_prompt, prompt_of
from spectune.evaluation.spans import span_statistics
from spectune.inference import halving, head_outputs


def judge_head(
    model: PreTrainedModel, questions: Questions, labels: Labels, losses: RowLosses | None = None
) -> list[JudgedRow]:
    """Measure every row under the model's current route. `losses`: of these rows, where they have just been taken."""
    task, examples = questions.task, questions.labelled
    pad = pad_token_id(questions.tokenizer, questions.vocab_size)
    if losses is None or losses.target_tokens != tuple(example.target_tokens for example in examples):
        losses = row_losses(model, examples, pad, task.batch_size)

    def outputs(size: int) -> list[Tensor]:
        return head_outputs(model, examples, pad, size)

    found = halving(outputs, task.batch_size, f"asking the head for {len(examples)} rows")
    said = [answers(output, labels) for output in found]
    metrics, statistics = _measured(examples, said, labels, task.label_metrics)
    place_of = {id(row): place for place, row in enumerate(task.rows)}
    return [
        JudgedRow(
            place_of[id(example.row)], example.row.origin, loss, count, metrics[n], statistics[n], asked_of(example),
            written(said[n], labels), (written(_truth(example, labels), labels),), example.row.source,
        )
        for n, (example, loss, count) in enumerate(
            zip(examples, losses.loss_sums, losses.target_tokens, strict=True)
        )
    ]  # fmt: skip


def answers(output: Tensor, labels: Labels) -> list[float]:
    """What a head says of one text: its class's number, its number, or the class's number of each word."""
    if labels.regression:
        return [float(output.flatten()[0])]
    return [float(number) for number in output.reshape(-1, labels.num_labels).argmax(-1).tolist()]


def written(values: Sequence[float], labels: Labels) -> str:
    """The same as text: a class's name, a number, or the words' tags as a JSON list."""
    if labels.regression:
        return f"{values[0]:.6g}"
    names = [labels.names[int(number)] for number in values]
    return json.dumps(names, ensure_ascii=False) if labels.task_type == "TOKEN_CLS" else names[0]


def _truth(example: LabelledExample, labels: Labels) -> list[float]:
    return [float(number) for number in example.classes] if example.label is None else [float(example.label)]


def asked_of(example: LabelledExample) -> str:
    """The text that the head reads, for a reader; of words those that were not cut."""
    row = example.row
    if row.tokens is not None:
        return " ".join(row.tokens[word] for word in example.words)
    return prompt_of(row) if has_prompt(row) else row.text or ""


def _measured(
    examples: Sequence[LabelledExample], said: Sequence[list[float]], labels: Labels, names: Sequence[str]
) -> tuple[list[dict[str, float]], list[dict[str, list[float]]]]:
    """By row the values whose mean is a metric, and the statistics of others."""
    truth = [_truth(example, labels) for example in examples]
    metrics, statistics = [dict[str, float]() for _ in examples], [dict[str, list[float]]() for _ in examples]
    for name in names:
        for place, (mine, right) in enumerate(zip(said, truth, strict=True)):
            if name == "accuracy":
                metrics[place][name] = float(mine == right)
            elif name == "mse":
                metrics[place][name] = (mine[0] - right[0]) ** 2 if math.isfinite(mine[0]) else math.nan
            elif name in CLASS_METRICS:
                statistics[place][name] = [right[0], mine[0], float(labels.num_labels)]
            elif name == "token_accuracy":
                alike = sum(a == b for a, b in zip(mine, right, strict=True))
                statistics[place][name] = [float(alike), float(len(right))]
            elif name == "span_f1":
                tags = ([labels.names[int(number)] for number in of] for of in (mine, right))
                statistics[place][name] = [float(count) for count in span_statistics(*tags)]
    if "pearson" in names:
        for place, sums in enumerate(pearson_statistics([v[0] for v in said], [v[0] for v in truth])):
            statistics[place]["pearson"] = sums
    return metrics, statistics
