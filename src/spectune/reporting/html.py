"""The table as HTML, for notebooks."""

from __future__ import annotations

from html import escape

from spectune.reporting.columns import (
    metric_columns,
    overhead_columns,
    quality_columns,
    storage_columns,
    training_columns,
)
from spectune.reporting.words import failure_lines, notes, verdict_sentences
from spectune.results.arm_result import arm_results
from spectune.results.comparison_file import ComparisonResult


def comparison_html(comparison: ComparisonResult) -> str:
    """The verdict, and quality and cost as one plain table with a caption; all text is escaped."""
    rows = arm_results(comparison)
    columns = [*quality_columns(comparison, rows), *metric_columns(rows)]
    columns += [*training_columns(comparison, rows)[1:], *overhead_columns(rows)[1:], *storage_columns(rows)[1:]]
    head = "".join(f'<th scope="col">{escape(column.title)}</th>' for column in columns)
    head += '<th scope="col">Best for (rule of thumb)</th>'
    body = ""
    for row in rows:
        cells = [*(column.text(row) for column in columns), row.best_for]
        body += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    above = "".join(f"<p><strong>{escape(sentence)}</strong></p>" for sentence in verdict_sentences(comparison)[:1])
    below = "<br>".join(escape(line) for line in [*failure_lines(comparison), *notes(comparison)])
    name = escape(comparison.base.name)
    table = f"<table><caption>{name}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"{above}{table}<p>{below}</p>"
