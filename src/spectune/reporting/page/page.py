"""`report.html`: the numbers of the tables and the figures put into a template, with everything escaped."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from spectune.reporting import columns, units, words
from spectune.reporting.grids import sources_grid, time_grid
from spectune.reporting.page import reproduce
from spectune.reporting.page.examples import examples
from spectune.reporting.page.svg import inline
from spectune.reporting.plots.style import Plot
from spectune.reporting.text import clipped, plain
from spectune.results import ComparisonResult
from spectune.results.arm_result import ArmResult, arm_results

HERE = Path(__file__).parent


def comparison_page(comparison: ComparisonResult, folder: Path, drawn: Sequence[tuple[Plot, str]]) -> str:
    """The page as text. `drawn` are the figures with their SVG files' text."""
    shown = {plot.name: (plot, inline(svg, plot)) for plot, svg in drawn if plot.in_page}
    rows = arm_results(comparison)
    groups = _groups(comparison, rows)
    runs = reproduce.run_lines(comparison)
    script = (HERE / "script.js").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["anchors"] = lambda proofs: _anchors(proofs, comparison, runs)
    environment.filters["plain"] = plain
    verdict = words.verdict_sentences(comparison)
    return environment.get_template("page.html.j2").render(
        title=f"Fine-tuning {clipped(comparison.base.name, 80)}: {len(rows)} methods compared",
        facts=_facts(comparison, rows),
        headline=verdict[0] if verdict else _without_verdict(rows, comparison.data.loss_unit),
        sentences=[*verdict[1:], *words.metric_sentences(comparison)],
        pick=words.recommendation_sentence(comparison),
        reasons=words.recommendation_reasons(comparison),
        context=words.recommendation_context(comparison),
        groups=groups,
        loss_unit=comparison.data.loss_unit if comparison.decided_by_loss else "of each arm's own kind",
        columns=[column for _, found in groups for column in found],
        table=rows,
        by_source=sources_grid(comparison),
        failures=words.failure_lines(comparison),
        changed=words.changed_sentence(comparison),
        notes=words.notes(comparison),
        verdict_plots=[shown[name] for name in ("verdict", "differences") if name in shown],
        quality_plots=[found for name, found in shown.items() if "quality" in name],
        curve_plots=[shown[name] for name in ("learning-curves", "data-curve") if name in shown],
        rate_plots=[found for name, found in shown.items() if name.startswith("learning-rate-")],
        examples=examples(comparison, folder),
        run_header=reproduce.run_header(comparison),
        runs=runs,
        memory=reproduce.memory_grid(comparison),
        time=time_grid(comparison),
        command=reproduce.command(comparison, folder),
        settings=reproduce.settings(comparison, folder),
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _groups(comparison: ComparisonResult, rows: Sequence[ArmResult]) -> list[tuple[str, list[columns.Column]]]:
    """The columns of the large table, after the method's own."""
    of = columns.columns_of(comparison, rows)
    training = [column for column in of.training if column is not columns.LEARNING_RATE]
    tested = columns.loss_title(comparison) == "Test loss"
    more = [*([columns.VALID_LOSS] if tested else []), *([columns.PERPLEXITY] if comparison.has_text else [])]
    for column in more if comparison.decided_by_loss else []:
        if column not in of.quality:
            of.quality.insert(of.quality.index(columns.RELATIVE), column)
    return [
        ("Quality", [*of.quality, *of.metrics]),
        ("Training", [columns.LEARNING_RATE, *training, columns.SEEDS]),
        ("Serving", [*of.overheads, *of.storage]),
        ("Rule of thumb", [columns.Column("Best for", lambda row: row.best_for)]),
    ]


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


def _without_verdict(rows: Sequence[ArmResult], unit: str) -> str:
    ended = [row for row in rows if row.loss is not None]
    if not ended:
        return "No verdict: no run ended."
    best = min(ended, key=lambda row: row.loss or 0.0)
    return (
        f"No verdict. {best.label} has the lowest loss here ({units.number(best.loss)} {unit}), but "
        "nothing was tested: close methods may change places with another seed."
    )


def _anchors(
    proofs: Sequence[str], comparison: ComparisonResult, runs: Sequence[reproduce.RunLine]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Links to the runs that prove a sentence: (label, [(anchor, seed)]) by arm; unknown ones are left out."""
    places = {run.cells[-1]: run for run in runs}
    found: dict[str, list[tuple[str, str]]] = {}
    for proof in proofs:
        if run := next((r for place, r in places.items() if f"{proof}/".startswith(f"{place}/")), None):
            found.setdefault(run.label, []).append((run.anchor, run.seed))
    return list(found.items())
