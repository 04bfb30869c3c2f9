"""The unrounded numbers as CSV: `comparison.csv` has a line an arm, `runs.csv` a line a run."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from spectune.files.plain_text import one_line
from spectune.results.arm_result import (
    PLAIN,
    arm_results,
    base_loss_by_source,
    method_of,
    metric_names,
    predicted_memory,
    source_names,
    training_memory,
)
from spectune.results.comparison_file import ComparisonResult

#: signs that begin a formula in a spreadsheet, those of East Asian width too
FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "\u2212")
#: what the time of a run by itself is called
_OWN = {"train_tokens_per_second": "own_tokens_per_second", "train_seconds": "own_train_seconds"}
#: fields of a run's result that are one number or word
RUN_FIELDS = (
    "learning_rate", "steps", "best_step", "target_tokens", "train_loss", "valid_loss", "last_valid_loss",
    "judged_loss", "base_valid_loss", "forgetting_kl_nats_per_token", "train_tokens_per_second", "train_seconds",
    "evaluation_seconds", "decode_tokens_per_second", "decode_tokens_per_second_base",
    "decode_tokens_per_second_merged", "swap_seconds", "trainable_parameters", "stored_parameters", "stored_bytes",
)  # fmt: skip


def comparison_csv(comparison: ComparisonResult) -> str:
    """One arm a line: the means over its seeds. Empty where a number does not exist; metrics have columns
    `metric_<name>`, with `_low` and `_high` where there are intervals, and the rows of several sources
    `judged_loss[<name>]`, with the bare base's beside it. Text that would be a formula has an apostrophe before it."""
    rows = arm_results(comparison)
    names = metric_names(rows)
    sources, base = source_names(comparison), base_loss_by_source(comparison)
    ranged = [name for name in names if any(name in row.metric_intervals for row in rows)]
    header = [*PLAIN, *(f"metric_{name}" for name in names)]
    header += [f"metric_{name}_{end}" for name in ranged for end in ("low", "high")]
    header += [f"{whose}judged_loss[{name}]" for whose in ("", "base_") for name in sources]
    lines = [
        [
            *(getattr(row, column) for column in PLAIN),
            *(row.metrics.get(name) for name in names),
            *(bound for name in ranged for bound in row.metric_intervals.get(name, (None, None))),
            *(losses.get(name) for losses in (row.loss_by_source, base) for name in sources),
        ]
        for row in rows
    ]
    return _csv(header, lines)


def runs_csv(comparison: ComparisonResult) -> str:
    """One final run a line, failed ones with their reason."""
    labels = comparison.labels
    runs = [run for found in comparison.runs_by_arm.values() for run in found]
    names = list(dict.fromkeys(key for run in runs for key in run.metrics))
    header = ["name", "method", "label", "seed", *RUN_FIELDS, "train_memory_bytes", "predicted_memory_bytes"]
    sources = source_names(comparison)
    header += [*(f"metric_{name}" for name in names), *(f"judged_loss[{name}]" for name in sources), "failed"]
    lines: list[list[Any]] = []
    for run in runs:
        numbers = [getattr(run, _OWN.get(key, key)) for key in RUN_FIELDS]
        numbers += [training_memory(run), predicted_memory(run), *(run.metrics.get(name) for name in names)]
        numbers += [run.judged_loss_by_source.get(name) for name in sources]
        lines.append([run.name, run.method, labels[run.name], run.seed, *numbers, None])
    blank = [None] * (len(header) - 6)
    lines += [
        [f.name, method_of(f.name, comparison), labels[f.name], f.seed, f.learning_rate, *blank, f.reason]
        for f in comparison.failed
    ]
    return _csv(header, lines)


def _csv(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_cell, header))
    writer.writerows(map(_cell, line) for line in lines)
    return out.getvalue()


def _cell(value: Any) -> Any:
    """Numbers as they are; text on one line, with an apostrophe before what a spreadsheet would compute."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if text.startswith(FORMULAS) else text
