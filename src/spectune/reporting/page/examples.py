"""What the methods write, side by side, on rows that a rule chose."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from spectune.files.plain_text import clipped
from spectune.reporting import units
from spectune.reporting.artifacts import judged_rows, rows_of
from spectune.reporting.columns import metric_text, metric_title
from spectune.results.comparison_file import ComparisonResult

COUNT = 12
#: characters of a prompt or an output that are shown
LONGEST = 700
#: of references: some data have dozens
REFERENCES = 6


@dataclass(frozen=True)
class Output:
    label: str
    text: str
    scores: str


@dataclass(frozen=True)
class Example:
    number: int
    origin: str
    prompt: str
    references: list[str]
    references_left_out: int
    outputs: list[Output]


@dataclass(frozen=True)
class Examples:
    rule: str
    chosen: list[Example]


def examples(comparison: ComparisonResult, folder: Path) -> Examples | None:
    """None where the runs left no outputs."""
    labels = comparison.labels
    tables = {labels[name]: judged_rows(folder, runs[0]) for name, runs in comparison.runs_by_arm.items()}
    written = {label: {n for n, row in rows.items() if _written(row)} for label, rows in tables.items()}
    tables = {label: rows for label, rows in tables.items() if written[label]}
    common = set.intersection(*(written[label] for label in tables)) if tables else set[int]()
    if not common:
        return None
    bare = rows_of(folder, "base/rows.jsonl")
    by_loss = common <= bare.keys()
    order = sorted(common, key=lambda n: (_loss(bare[n]) or 0.0, n)) if by_loss else sorted(common)
    count = min(COUNT, len(order))
    picked = [order[round(i * (len(order) - 1) / max(count - 1, 1))] for i in range(count)]
    how = "by the bare base's loss, from the easiest row to the hardest" if by_loss else "by their place in the data"
    rule = (
        f"{count} of the {len(order)} rows that every method wrote, chosen by rule and not by hand: evenly spaced "
        f"{how}. Outputs are those of each method's first seed."
    )
    if any(_written(bare.get(n, {})) for n in picked):
        tables = {"Bare base": bare, **tables}
    return Examples(rule, [_example(i + 1, n, tables) for i, n in enumerate(picked)])


def _example(number: int, row: int, tables: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Example:
    first = next(table[row] for table in reversed(list(tables.values())) if row in table)
    references = [clipped(str(reference), LONGEST) for reference in first.get("references") or ()]
    origin = str(first.get("origin") or f"row {row}")
    return Example(
        number,
        # a file's name and line; its folder is that of the machine that ran
        PurePath(origin).name if PurePath(origin).is_absolute() else origin,
        clipped(str(first.get("prompt") or ""), LONGEST),
        references[:REFERENCES],
        max(0, len(references) - REFERENCES),
        [
            Output(label, clipped(str(table[row]["prediction"]), LONGEST), _scores(table[row]))
            for label, table in tables.items()
            if _written(table.get(row, {}))
        ],
    )


def _written(row: Mapping[str, Any]) -> bool:
    """Whether the model wrote something for the row, be it nothing: a row that was only scored has a null here."""
    return row.get("prediction") is not None


def _scores(row: Mapping[str, Any]) -> str:
    loss = _loss(row)
    parts = [] if loss is None else [f"loss {units.number(loss, 2)}"]
    metrics = row.get("metrics") or {}
    parts += [f"{metric_title(name)} {metric_text(name, value)}" for name, value in metrics.items()]
    return ", ".join(parts)


def _loss(row: Mapping[str, Any]) -> float | None:
    """Nats per target token."""
    total, tokens = row.get("loss_sum"), row.get("target_tokens")
    return None if total is None or not tokens else float(total) / float(tokens)
