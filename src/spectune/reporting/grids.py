"""Every table of a comparison as text: a terminal and Markdown show the same cells."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from spectune.phases import PHASES
from spectune.reporting import units
from spectune.reporting.columns import METHOD, Column, columns_of, loss_title, metric_text
from spectune.results.arm_result import ArmResult, arm_results, base_loss_by_source, metric_names, source_names
from spectune.results.comparison_file import ComparisonResult, Share
from spectune.results.time_spent import TOTAL, time_spent

SCALE_TITLE = "Share of the weights on models of known size"


@dataclass(frozen=True)
class Grid:
    """A table of text; `words` are the columns (by number) that hold words, all others hold numbers."""

    title: str
    header: list[str]
    body: list[list[str]]
    words: set[int] = field(default_factory=lambda: {0})


def grids(comparison: ComparisonResult) -> list[Grid]:
    """Quality, task metrics, loss by source, cost, learning rates, and what a textbook says; those that there is
    nothing for are left out."""
    rows = arm_results(comparison)
    base = comparison.base
    facts = f"{units.count(base.total_parameters)} weights, validation loss {units.number(base.valid_loss)}"
    if not comparison.has_text:
        facts += " of its untrained head"
    columns = columns_of(comparison, rows)
    found = [_over_arms(f"Quality: {base.name} ({facts} before training)", columns.quality, rows)]
    found += [_metrics(comparison, columns.metrics, rows)] if columns.metrics else []
    found += [by_source] if (by_source := sources_grid(comparison)) is not None else []
    found.append(_over_arms("Cost of training", columns.training, rows))
    if len(columns.overheads) == 1:
        found.append(_over_arms("Cost of serving", [*columns.overheads, *columns.storage], rows))
    else:  # too wide for one
        found.append(_over_arms("Cost of serving: time", columns.overheads, rows))
        found.append(_over_arms("Cost of serving: storage", columns.storage, rows))
    found += [_searches(comparison)] if comparison.searches else []
    found.append(_textbook(comparison, rows))
    return [grid for grid in found if len(grid.header) > 1]


def _over_arms(title: str, columns: Sequence[Column], rows: Sequence[ArmResult]) -> Grid:
    columns = [METHOD, *columns]
    words = {number for number, column in enumerate(columns) if column.words}
    body = [[column.text(row) for column in columns] for row in rows]
    return Grid(title, [column.title for column in columns], body, words)


def _metrics(comparison: ComparisonResult, columns: Sequence[Column], rows: Sequence[ArmResult]) -> Grid:
    count = comparison.data.generated_rows
    grid = _over_arms(f"Task metrics (generation: {count:,} rows)" if count else "Task metrics", columns, rows)
    if bare := comparison.base.metrics:
        bases = [("Bare base" if comparison.has_text else "Untrained head", bare)]
        bases += [("Untrained head", found.metrics) for found in comparison.other_bases.values()]
        for label, of_base in bases:
            grid.body.append([label, *(metric_text(name, of_base.get(name)) for name in metric_names(rows))])
    return grid


def sources_grid(comparison: ComparisonResult) -> Grid | None:
    """The judged loss on the rows of each source, of every arm and of the bare base; None where there is one source."""
    if not (names := source_names(comparison)):
        return None
    rows = [(row.label, row.loss_by_source) for row in arm_results(comparison) if not row.failed]
    rows.append(("Bare base", base_loss_by_source(comparison)))
    body = [[label, *(units.number(losses.get(name)) for name in names)] for label, losses in rows]
    return Grid(f"{loss_title(comparison)} by source", ["Method", *names], body)


def time_grid(comparison: ComparisonResult) -> Grid | None:
    """Where the time went, by phase: of each arm, of what they share, and of all; None where the file does not say."""
    if not (spent := time_spent(comparison)):
        return None
    phases = list(spent[TOTAL])
    body = [
        [label, *(units.seconds(took.get(phase)) for phase in phases), units.seconds(sum(took.values()))]
        for label, took in spent.items()
    ]
    return Grid("Where the time went", ["Method", *(PHASES.get(phase, phase) for phase in phases), "In all"], body)


def _searches(comparison: ComparisonResult) -> Grid:
    labels = comparison.labels
    body: list[list[str]] = []
    for name, search in comparison.searches.items():
        bad = sum(trial.valid_loss is None for trial in search.trials)
        searched = " to ".join(map(units.rate, search.range or (None, None)))
        tried = f"{len(search.trials)} ({bad} failed)" if bad else str(len(search.trials))
        best_lies = "inside" if search.edge is None else f"on the {search.edge} edge"
        body.append([labels.get(name, name), units.rate(search.best), searched, tried, best_lies])
    return Grid("Learning rates", ["Method", "Best", "Searched", "Trials", "Best lies"], body, {0, 4})


def _textbook(comparison: ComparisonResult, rows: Sequence[ArmResult]) -> Grid:
    header = ["Method", *(f"{shape.model} ({units.count(shape.total_parameters)})" for shape in comparison.scale)]
    body: list[list[str]] = []
    for row in {row.method: row for row in reversed(rows)}.values():
        shares = [shape.shares.get(row.method, Share()) for shape in comparison.scale]
        known = [f"{units.percent(found.share)} ({units.count(found.parameters)})" for found in shares]
        cells = [units.MISSING if found.share is None else cell for found, cell in zip(shares, known, strict=True)]
        body.insert(0, [row.label, *cells, row.best_for])
    return Grid(SCALE_TITLE, [*header, "Best for (rule of thumb)"], body, {0, len(header)})
