"""`report.html`: the numbers of the tables and the figures put into a template, with everything escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from spectune.reporting import units
from spectune.reporting.columns import (
    LEARNING_RATE,
    PERPLEXITY,
    RELATIVE,
    SEEDS,
    VALID_LOSS,
    Column,
    loss_title,
    metric_columns,
    overhead_columns,
    quality_columns,
    storage_columns,
    training_columns,
)
from spectune.reporting.page import reproduce
from spectune.reporting.page.examples import examples
from spectune.reporting.page.svg import inline
from spectune.reporting.plots.style import Plot
from spectune.reporting.text import clipped, plain
from spectune.reporting.words import (
    failure_lines,
    metric_sentences,
    notes,
    recommendation_context,
    recommendation_reasons,
    recommendation_sentence,
    verdict_sentences,
)
from spectune.results.arm_result import ArmResult, arm_results
from spectune.results.comparison_file import ComparisonResult

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Drawn:
    """A figure in the page."""

    plot: Plot
    svg: Markup


@dataclass(frozen=True)
class Cell:
    """A cell of the sortable table; `value` is the number it sorts by."""

    text: str
    value: float | None
    words: bool


def comparison_page(comparison: ComparisonResult, folder: Path, drawn: Sequence[tuple[Plot, str]]) -> str:
    """The page as text. `drawn` are the figures with their SVG files' text."""
    shown = {
        plot.name: Drawn(plot, inline(svg, plot.name, plot.title, plot.description))
        for plot, svg in drawn
        if plot.in_page
    }
    rows = arm_results(comparison)
    groups = _groups(comparison, rows)
    columns = [column for _, found in groups for column in found]
    runs = reproduce.run_lines(comparison)
    script = (HERE / "script.js").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["anchors"] = lambda proofs: _anchors(proofs, comparison, runs)
    environment.filters["plain"] = plain
    verdict = verdict_sentences(comparison)
    return environment.get_template("page.html.j2").render(
        title=f"Fine-tuning {clipped(comparison.base.name, 80)}: {len(rows)} methods compared",
        facts=_facts(comparison, rows),
        headline=verdict[0] if verdict else _without_verdict(rows),
        sentences=[*verdict[1:], *metric_sentences(comparison)],
        pick=recommendation_sentence(comparison),
        reasons=recommendation_reasons(comparison),
        context=recommendation_context(comparison),
        groups=groups,
        columns=columns,
        table=[(row, [_cell(column, row) for column in columns]) for row in rows],
        failures=failure_lines(comparison),
        notes=notes(comparison),
        verdict_plots=_pick(shown, "verdict", "differences"),
        quality_plots=_pick(
            shown, "quality-and-share", "quality-and-memory", "quality-and-time", "forgetting-and-quality"
        ),
        curve_plots=_pick(shown, "learning-curves", "data-curve"),
        rate_plots=[found for name, found in shown.items() if name.startswith("learning-rate-")],
        examples=examples(comparison, folder),
        run_header=reproduce.run_header(comparison),
        runs=runs,
        memory=reproduce.memory_grid(comparison),
        command=reproduce.command(comparison, folder),
        settings=reproduce.settings(comparison, folder),
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _groups(comparison: ComparisonResult, rows: Sequence[ArmResult]) -> list[tuple[str, list[Column]]]:
    """The columns of the large table, after the method's own."""
    quality = quality_columns(comparison, rows)[1:]
    training = [column for column in training_columns(comparison, rows)[1:] if column is not LEARNING_RATE]
    if loss_title(comparison) == "Test loss":
        quality.insert(quality.index(RELATIVE), VALID_LOSS)
    if PERPLEXITY not in quality:
        quality.insert(quality.index(RELATIVE), PERPLEXITY)
    return [
        ("Quality", [*quality, *metric_columns(rows)]),
        ("Training", [LEARNING_RATE, *training, SEEDS]),
        ("Serving", [*overhead_columns(rows)[1:], *storage_columns(rows)[1:]]),
        ("Rule of thumb", [Column("Best for", lambda row: row.best_for)]),
    ]


def _cell(column: Column, row: ArmResult) -> Cell:
    return Cell(column.text(row), None if column.value is None else column.value(row), column.words)


def _pick(shown: Mapping[str, Drawn], *names: str) -> list[Drawn]:
    return [shown[name] for name in names if name in shown]


def _facts(comparison: ComparisonResult, rows: Sequence[ArmResult]) -> list[str]:
    base, data = comparison.base, comparison.data
    seeds = max((row.seeds for row in rows), default=1)
    facts = [
        f"{units.count(base.total_parameters)} weights, {base.dtype} on {base.device}",
        f"trained on {data.train_rows:,} rows",
        f"judged on {data.judged_rows or data.valid_rows:,} {data.judged_on} rows",
        f"{seeds} seed{'s' if seeds > 1 else ''} a method",
    ]
    return [*facts, f"preset {comparison.preset.name}"] if comparison.preset.name else facts


def _without_verdict(rows: Sequence[ArmResult]) -> str:
    """The headline where nothing was tested."""
    ended = [row for row in rows if row.loss is not None]
    if not ended:
        return "No verdict: no run ended."
    best = min(ended, key=lambda row: row.loss if row.loss is not None else 0.0)
    return (
        f"No verdict. {best.label} has the lowest loss here ({units.number(best.loss)} nats per target token), but "
        "nothing was tested: close methods may change places with another seed."
    )


def _anchors(
    proofs: Sequence[str], comparison: ComparisonResult, runs: Sequence[reproduce.RunLine]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Links to the runs that prove a sentence: (label, [(anchor, seed)]) by arm; unknown ones are left out."""
    places = {run.cells[-1]: run for run in runs}
    found: dict[str, list[tuple[str, str]]] = {}
    for proof in proofs:
        run = next((r for place, r in places.items() if proof == place or proof.startswith(f"{place}/")), None)
        if run is not None:
            found.setdefault(run.label, []).append((run.anchor, run.seed))
    return list(found.items())
