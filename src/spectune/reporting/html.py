"""The table as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from spectune.reporting.rows import comparison_rows
from spectune.reporting.tables import COST, QUALITY, notes


def comparison_html(comparison: Mapping[str, Any]) -> str:
    """Quality and cost as one plain table with a caption; all text is escaped."""
    columns = QUALITY + COST[1:]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name, _ in columns)
    body = ""
    for row in comparison_rows(comparison):
        cells = "".join(f"<td>{escape(cell(row))}</td>" for _, cell in columns)
        body += f"<tr>{cells}</tr>"
        if row.failed:
            body += f'<tr><td colspan="{len(columns)}">{escape(row.label)} failed: {escape(row.failed)}</td></tr>'
    below = "<br>".join(escape(note) for note in notes(comparison))
    name = escape(str(comparison["base"]["name"]))
    return f"<table><caption>{name}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{below}</p>"
