"""The tables that a student of fine-tuning knows, filled with measurements: on a terminal, as Markdown and HTML."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from spectune.files.plain_text import one_line
from spectune.reporting import words
from spectune.reporting.columns import METHOD, columns_of
from spectune.reporting.grids import Grid, grids, sources_grid, time_grid
from spectune.reporting.made_plain import made_plain
from spectune.results import ComparisonResult
from spectune.results.arm_result import arm_results

#: characters of a sentence, and of a cell
LONGEST, LONGEST_CELL = 2000, 200
#: characters of a column that are never folded
WIDEST = 30
#: what Markdown gives a meaning inside a line
_MARKDOWN = re.compile(r"[\\|<&`*\[\]!$~]")
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


def comparison_table(comparison: ComparisonResult) -> Group:
    """The verdict, the tables, the recommendation, failures, and what a reader must know."""
    comparison = made_plain(comparison)
    verdict = words.verdict_sentences(comparison)
    parts: list[Any] = [_text(sentence, "" if number else "bold") for number, sentence in enumerate(verdict)]
    parts += [_text(sentence) for sentence in words.metric_sentences(comparison)]
    parts += [Text()] if parts else []
    parts += [part for grid in grids(comparison) for part in (_rich(grid), Text())]
    pick = words.recommendation_sentence(comparison)
    parts += [] if pick is None else [_text(pick, "bold")]
    parts += [_text(f"- {reason}") for reason, _ in words.recommendation_reasons(comparison)]
    parts += [_text(line) for line in words.recommendation_context(comparison)]
    parts += [_text(line, "red") for line in words.failure_lines(comparison)]
    parts += [_text(note, "dim") for note in words.notes(comparison)]
    return Group(*parts)


def comparison_markdown(comparison: ComparisonResult) -> str:
    """The same as Markdown."""
    lines = []
    if verdict := words.verdict_sentences(comparison):
        others = [f"- {_escaped(sentence)}" for sentence in [*verdict[1:], *words.metric_sentences(comparison)]]
        lines += ["## Verdict", "", f"**{_escaped(verdict[0])}**", "", *others, *([""] if others else [])]
    if (pick := words.recommendation_sentence(comparison)) is not None:
        reasons = [
            f"- {_escaped(reason)}" + (f" ({words.evidence(runs, comparison)})" if runs else "")
            for reason, runs in words.recommendation_reasons(comparison)
        ]
        lines += ["## What we would pick, and why", "", f"**{_escaped(pick)}**", "", *reasons, ""]
        lines += [text for line in words.recommendation_context(comparison) for text in (_escaped(line), "")]
    for grid in [*grids(comparison), *filter(None, [time_grid(comparison)])]:
        rule = ["---" if number in grid.words else "---:" for number in range(len(grid.header))]
        lines += [f"## {_escaped(grid.title)}", "", _line(grid.header), _line(rule), *map(_line, grid.body), ""]
    lines += [f"- {_escaped(line)}" for line in [*words.failure_lines(comparison), *words.notes(comparison)]]
    return "\n".join(lines) + "\n"


def comparison_html(comparison: ComparisonResult) -> str:
    """For notebooks: the verdict, quality and cost as one plain table with a caption, and the losses by source as one
    where there are several; all text is escaped."""
    comparison = made_plain(comparison)
    rows = arm_results(comparison)
    of = columns_of(comparison, rows)
    columns = [METHOD, *of.quality, *of.metrics, *of.training, *of.overheads, *of.storage]
    titles = [*(column.title for column in columns), "Best for (rule of thumb)"]
    lines = [[*(column.text(row) for column in columns), row.best_for] for row in rows]
    tables = _html(comparison.base.name, titles, lines)
    if (by_source := sources_grid(comparison)) is not None:
        tables += _html(by_source.title, by_source.header, by_source.body)
    above = "".join(f"<p><strong>{_html_text(text)}</strong></p>" for text in words.verdict_sentences(comparison)[:1])
    below = "<br>".join(map(_html_text, [*words.failure_lines(comparison), *words.notes(comparison)]))
    return f"{above}{tables}<p>{below}</p>"


def _html(caption: str, titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_html_text(title)}</th>' for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{_html_text(cell)}</td>' for cell in line)}</tr>" for line in lines)
    caption = f"<caption>{_html_text(caption)}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_text(content: str) -> str:
    return escape(one_line(content))


def _rich(grid: Grid) -> Table:
    # two spaces between columns, so that most tables fit into 80
    title = _text(grid.title, "bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    for number, name in enumerate(grid.header):
        # a number is not broken, but between the two sides of a slash
        numbers = [] if number in grid.words else [row[number].replace(" / ", " /\n", 1) for row in grid.body]
        head = _text(name, most=LONGEST_CELL)
        width = max(map(len, [*head.plain.split(), *(part for cell in numbers for part in cell.split("\n"))]))
        way: Any = "left" if number in grid.words else "right"
        at_least = min(width, WIDEST)
        table.add_column(head, justify=way, no_wrap=number == 0, overflow="fold", min_width=at_least)
    for cells in grid.body:
        table.add_row(*(_text(cell, most=LONGEST_CELL) for cell in cells))
    return table


def _text(content: str, style: str = "", most: int = LONGEST) -> Text:
    """Text as it stands: no markup in it."""
    return Text(one_line(content, most), style=style)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(_escaped(cell, LONGEST_CELL) for cell in cells) + " |"


def _escaped(content: str, most: int = LONGEST) -> str:
    """On one line, with nothing that ends a cell, opens a tag, or makes a link, a picture, code or a formula."""
    return _MARKDOWN.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), one_line(content, most))
