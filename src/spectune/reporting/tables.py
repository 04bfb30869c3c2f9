"""The tables that a student of fine-tuning knows, filled with measurements: on a terminal and as Markdown."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from spectune.reporting.grids import Grid, grids
from spectune.reporting.spreadsheets import comparison_csv
from spectune.reporting.text import one_line
from spectune.reporting.words import (
    evidence,
    failure_lines,
    metric_sentences,
    notes,
    recommendation_context,
    recommendation_reasons,
    recommendation_sentence,
    verdict_sentences,
)
from spectune.results.comparison_file import ComparisonResult

__all__ = ["comparison_csv", "comparison_markdown", "comparison_table"]


def comparison_table(comparison: ComparisonResult) -> Group:
    """The verdict, the tables, the recommendation, failures, and what a reader must know."""
    verdict = verdict_sentences(comparison)
    parts: list[Any] = [_text(sentence, "" if number else "bold") for number, sentence in enumerate(verdict)]
    parts += [_text(sentence) for sentence in metric_sentences(comparison)]
    parts += [Text()] if parts else []
    parts += [part for grid in grids(comparison) for part in (_rich(grid), Text())]
    pick = recommendation_sentence(comparison)
    parts += [] if pick is None else [_text(pick, "bold")]
    parts += [_text(f"- {reason}") for reason, _ in recommendation_reasons(comparison)]
    parts += [_text(line) for line in recommendation_context(comparison)]
    parts += [_text(line, "red") for line in failure_lines(comparison)]
    parts += [_text(note, "dim") for note in notes(comparison)]
    return Group(*parts)


def comparison_markdown(comparison: ComparisonResult) -> str:
    """The same as Markdown."""
    lines = []
    verdict = verdict_sentences(comparison)
    if verdict:
        others = [f"- {_escaped(sentence)}" for sentence in [*verdict[1:], *metric_sentences(comparison)]]
        lines += ["## Verdict", "", f"**{_escaped(verdict[0])}**", "", *others, "" if others else None]
    pick = recommendation_sentence(comparison)
    if pick is not None:
        reasons = [
            f"- {_escaped(reason)}" + (f" ({_escaped(evidence(runs, comparison))})" if runs else "")
            for reason, runs in recommendation_reasons(comparison)
        ]
        lines += ["## What we would pick, and why", "", f"**{_escaped(pick)}**", "", *reasons, ""]
        lines += [text for line in recommendation_context(comparison) for text in (_escaped(line), "")]
    for grid in grids(comparison):
        rule = ["---" if number in grid.words else "---:" for number in range(len(grid.header))]
        lines += [f"## {_escaped(grid.title)}", "", _line(grid.header), _line(rule), *map(_line, grid.body), ""]
    lines += [f"- {_escaped(line)}" for line in failure_lines(comparison)]
    lines += [f"- {_escaped(note)}" for note in notes(comparison)]
    return "\n".join(line for line in lines if line is not None) + "\n"


def _rich(grid: Grid) -> Table:
    # two spaces between columns, so that most tables fit into 80
    table = Table(
        title=_text(grid.title, "bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for number, name in enumerate(grid.header):
        cells = [row[number] for row in grid.body]
        words = number in grid.words
        table.add_column(
            _text(name),
            justify="left" if words else "right",
            no_wrap=number == 0,
            overflow="fold",
            # a number is not broken, but between the two sides of a slash
            min_width=max(map(len, name.split() + ([] if words else [p for c in cells for p in _parts(c)]))),
        )
    for cells in grid.body:
        table.add_row(*map(_text, cells))
    return table


def _parts(cell: str) -> list[str]:
    left, slash, right = cell.partition(" / ")
    return [f"{left} /", right] if slash else [cell]


def _text(content: str, style: str = "") -> Text:
    """Text as it stands: no markup in it."""
    return Text(one_line(content), style=style)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(content: str) -> str:
    """On one line, with nothing that ends a cell or opens a tag."""
    return one_line(content).replace("|", "\\|").replace("<", "&lt;")
