"""Every table of a comparison as text: a terminal and Markdown show the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from spectune.reporting import units
from spectune.reporting.columns import (
    METHOD,
    Column,
    metric_columns,
    metric_text,
    overhead_columns,
    quality_columns,
    storage_columns,
    training_columns,
)
from spectune.results.arm_result import ArmResult, arm_results, metric_names
from spectune.results.comparison_file import ComparisonResult, Share

SCALE_TITLE = "Share of the weights on models of known size"


@dataclass(frozen=True)
class Grid:
    """A table of text; `words` are the columns (by number) that hold words, all others hold numbers."""

    title: str
    header: list[str]
    body: list[list[str]]
    words: set[int] = field(default_factory=lambda: {0})


def grids(comparison: ComparisonResult) -> list[Grid]:
    """Quality, task metrics, cost, learning rates, and what a textbook says; those that there is nothing for are
    left out."""
    rows = arm_results(comparison)
    base = comparison.base
    quality = (
        f"Quality: {base.name} ({units.count(base.total_parameters)} weights, "
        f"validation loss {units.number(base.valid_loss)} before training)"
    )
    found = [_over_arms(quality, quality_columns(comparison, rows), rows)]
    found += [_metrics(comparison, rows)] if metric_names(rows) else []
    found.append(_over_arms("Cost of training", training_columns(comparison, rows), rows))
    overheads, storage = overhead_columns(rows), storage_columns(rows)
    if len(overheads) == 2:
        found.append(_over_arms("Cost of serving", [*overheads, *storage[1:]], rows))
    else:  # too wide for one
        found.append(_over_arms("Cost of serving: time", overheads, rows))
        found.append(_over_arms("Cost of serving: storage", storage, rows))
    found += [_searches(comparison)] if comparison.searches else []
    found.append(_textbook(comparison, rows))
    return [grid for grid in found if len(grid.header) > 1]


def _over_arms(title: str, columns: Sequence[Column], rows: Sequence[ArmResult]) -> Grid:
    return Grid(
        title,
        [column.title for column in columns],
        [[column.text(row) for column in columns] for row in rows],
        {number for number, column in enumerate(columns) if column.words},
    )


def _metrics(comparison: ComparisonResult, rows: Sequence[ArmResult]) -> Grid:
    count = comparison.data.generated_rows
    where = f" (generation: {count:,} rows)" if count else ""
    grid = _over_arms(f"Task metrics{where}", [METHOD, *metric_columns(rows)], rows)
    bare = comparison.base.metrics
    if bare:
        grid.body.append(["Bare base", *(metric_text(name, bare.get(name)) for name in metric_names(rows))])
    return grid


def _searches(comparison: ComparisonResult) -> Grid:
    labels = comparison.labels
    body: list[list[str]] = []
    for name, search in comparison.searches.items():
        bad = sum(trial.valid_loss is None for trial in search.trials)
        low, high = search.range or (None, None)
        tried = len(search.trials)
        body.append(
            [
                labels.get(name, name),
                units.rate(search.best),
                f"{units.rate(low)} to {units.rate(high)}",
                f"{tried} ({bad} failed)" if bad else str(tried),
                "inside" if search.edge is None else f"on the {search.edge} edge",
            ]
        )
    return Grid("Learning rates", ["Method", "Best", "Searched", "Trials", "Best lies"], body, {0, 4})


def _textbook(comparison: ComparisonResult, rows: Sequence[ArmResult]) -> Grid:
    shapes = comparison.scale
    header = ["Method", *(f"{shape.model} ({units.count(shape.total_parameters)})" for shape in shapes)]
    best_for = {row.method: row.best_for for row in reversed(rows)}
    body: list[list[str]] = []
    for method, label in {row.method: row.label for row in reversed(rows)}.items():
        cells: list[str] = []
        for shape in shapes:
            found = shape.shares.get(method, Share())
            known = f"{units.percent(found.share)} ({units.count(found.parameters)})"
            cells.append(units.MISSING if found.share is None else known)
        body.insert(0, [label, *cells, best_for[method]])
    return Grid(SCALE_TITLE, [*header, "Best for (rule of thumb)"], body, {0, len(header)})
