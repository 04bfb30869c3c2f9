"""The table that a student of fine-tuning knows, filled with measurements: on a terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from spectune.reporting import units
from spectune.reporting.rows import COLUMNS, ComparisonRow, comparison_rows, why_no_relative_performance

Cell = Callable[[ComparisonRow], str]

QUALITY: list[tuple[str, Cell]] = [
    ("Method", lambda r: r.label),
    ("Trainable", lambda r: units.count(r.trainable_parameters)),
    ("Share", lambda r: units.percent(r.trainable_share)),
    ("Valid loss", lambda r: units.number(r.valid_loss)),
    ("Perplexity", lambda r: units.number(r.valid_perplexity, 2)),
    ("Relative perf.", lambda r: units.MISSING if r.relative_performance is None else f"{r.relative_performance:.1f}"),
    ("Forgetting", lambda r: units.number(r.forgetting_kl_nats_per_token)),
    ("Learning rate", lambda r: units.MISSING if r.learning_rate is None else f"{r.learning_rate:g}"),
]
COST: list[tuple[str, Cell]] = [
    ("Method", lambda r: r.label),
    ("Memory", lambda r: units.size(r.train_memory_bytes)),
    ("Training speed", lambda r: _speed(r)),
    ("Inference overhead", lambda r: _overhead(r)),
    ("Stored", lambda r: units.size(r.stored_bytes)),
    ("10 tasks", lambda r: units.size(r.bytes_for_ten_tasks)),
    ("Swap", lambda r: units.seconds(r.swap_seconds)),
    ("Best for (rule of thumb)", lambda r: r.best_for),
]


def comparison_table(comparison: Mapping[str, Any]) -> Group:
    """Quality, cost, and the share of each method on models that everybody knows."""
    rows = comparison_rows(comparison)
    parts: list[Any] = [_rich(title, columns, rows) for title, columns in _sections(comparison)]
    parts.append(_scale(comparison))
    parts += [Text(f"{row.label} failed: {row.failed}", style="red") for row in rows if row.failed]
    parts += [Text(note, style="dim") for note in notes(comparison)]
    return Group(*parts)


def notes(comparison: Mapping[str, Any]) -> list[str]:
    """What a reader must know to read the table right."""
    data, base = comparison["data"], comparison["base"]
    why = why_no_relative_performance(comparison)
    return [
        "Relative perf.: 100 x (base - method) / (base - full) of validation loss"
        + (f"; undefined here: {why}." if why else "; 0 is the bare base, 100 is full fine-tuning."),
        f"Losses are nats per target token on {data['valid_rows']:,} rows. Forgetting: mean KL(base || tuned), nats "
        f"per token, on {data['retained_passages']} passages ({data['retained_from']}).",
        f"Memory: peak of tensors in a training step ({base['device']}, {base['dtype']}). Inference overhead: time for "
        "each decoded token at batch 1 against the bare base, unmerged / merged; ± is half the range over rounds in "
        "which both were timed in turn.",
        "One seed and one learning rate for each method: differences of a few per cent may be noise or tuning.",
    ]


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    rows = comparison_rows(comparison)
    lines = []
    for title, columns in _sections(comparison):
        lines += [f"## {title}", "", _line([name for name, _ in columns]), _line(["---"] * len(columns))]
        lines += [_line([_cell(cell, row) for _, cell in columns]) for row in rows]
        lines.append("")
    header, body = _scale_cells(comparison)
    lines += [f"## {SCALE_TITLE}", "", _line(header), _line(["---"] * len(header)), *map(_line, body), ""]
    lines += [f"- {row.label} failed: {row.failed}" for row in rows if row.failed]
    lines += [f"- {note}" for note in notes(comparison)]
    return "\n".join(lines) + "\n"


def comparison_csv(comparison: Mapping[str, Any]) -> str:
    """The unrounded numbers, one run a line; empty where a number does not exist."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in comparison_rows(comparison):
        values = [getattr(row, column) for column in COLUMNS]
        writer.writerow(["" if value is None else value for value in values])
    return out.getvalue()


SCALE_TITLE = "Share of the weights on models of known size"


def _sections(comparison: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Cell]]]]:
    base = comparison["base"]
    name = f"{base['name']} ({units.count(base['total_parameters'])} weights"
    loss = f", validation loss {units.number(base['valid_loss'])} before training)"
    return [(f"Quality: {name}{loss}", QUALITY), ("Cost", COST)]


def _rich(title: str, columns: list[tuple[str, Cell]], rows: list[ComparisonRow]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for index, (name, _) in enumerate(columns):
        words = name in ("Method", COST[-1][0])
        table.add_column(name, justify="left" if words else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(_cell(cell, row) for _, cell in columns))
    return table


def _cell(cell: Cell, row: ComparisonRow) -> str:
    text = cell(row)
    return f"{text} (failed)" if row.failed and cell is QUALITY[0][1] else text


def _scale(comparison: Mapping[str, Any]) -> Table:
    header, body = _scale_cells(comparison)
    table = Table(title=SCALE_TITLE, title_justify="left", title_style="bold", pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for cells in body:
        table.add_row(*cells)
    return table


def _scale_cells(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    shapes = comparison["scale"]
    header = ["Method", *(f"{shape['model']} ({units.count(shape['total_parameters'])})" for shape in shapes)]
    labels = {row.method: row.label for row in comparison_rows(comparison)}
    body = []
    for method, label in labels.items():
        cells = []
        for shape in shapes:
            found = shape["shares"].get(method, {"share": None, "parameters": None})
            cells.append(f"{units.percent(found['share'])}  ({units.count(found['parameters'])})")
        body.append([label, *cells])
    return header, body


def _speed(row: ComparisonRow) -> str:
    if row.train_tokens_per_second is None:
        return units.MISSING
    ratio = "" if row.speed_to_full is None else f" ({row.speed_to_full:.2f}x full)"
    return f"{units.count(row.train_tokens_per_second)} tok/s{ratio}"


def _overhead(row: ComparisonRow) -> str:
    if row.failed:
        return units.MISSING
    tuned = _with_noise(row.inference_overhead, row.inference_overhead_noise)
    if row.inference_overhead_merged is None:
        return f"{tuned} / not mergeable"
    return f"{tuned} / {_with_noise(row.inference_overhead_merged, row.inference_overhead_merged_noise)}"


def _with_noise(overhead: float | None, noise: float | None) -> str:
    """+25% ±3%; "within noise" where the rounds differ by more than there is to show."""
    if overhead is None or noise is None:
        return units.percent(overhead, sign=True)
    spread = f"±{100 * noise:.0f}%"
    return f"within noise ({spread})" if abs(overhead) <= noise else f"{units.percent(overhead, sign=True)} {spread}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
