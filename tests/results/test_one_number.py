"""One name, one number: page, table, Markdown, CSV and recommendation agree on what they print of an arm."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spectune.comparing.advising.recommend import recommend
from spectune.comparing.judging.verdict import verdict
from spectune.reporting import comparison_table, units, write_reports
from spectune.results import ComparisonResult, Limits
from tests.comparing.invented import invent

LEVELS = {"full": 1.0, "lora": 1.1, "adapter": 1.4, "prefix": 2.0, "bitfit": 2.4}
#: column of the tables -> that of comparison.csv
NAMES = {
    "Test loss": "loss",
    "Relative perf.": "relative_performance",
    "Memory": "train_memory_bytes",
    "Time": "train_seconds",
    "Inference overhead": "inference_overhead",
    "Stored": "stored_bytes",
    "10 tasks": "bytes_for_ten_tasks",
}


def compared(folder: Path, levels: dict[str, float], limits: Limits) -> ComparisonResult:
    """A comparison judged on test rows, whose validation losses are in another proportion."""
    content = invent(folder, levels)
    content["base"] |= {"valid_loss": 3.0, "total_parameters": 1000, "device": "cpu", "dtype": "float32"}
    content["data"] = {"judged_on": "test", "judged_rows": 200, "train_rows": 10, "valid_rows": 5}
    for run in content["runs"]:
        noise = 1 + run["seed"] / 7
        run |= {"valid_loss": run["valid_loss"] ** 0.5 * noise, "base_valid_loss": 3.0}
        run["train_seconds"] *= noise
        run["peak_memory_bytes"] = {"train_allocated": int(1e9 * noise)}
        run["decode_tokens_per_second"] /= noise
    result = ComparisonResult.model_validate(content)
    result.verdict = verdict(result, folder)
    result.recommendation = recommend(result, limits)
    write_reports(result, folder)
    return result


class SortableTable(HTMLParser):
    """The cells of the page's large table: (text, the number it sorts by)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[list[Any]]] = []
        self.inside = self.open = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.inside = self.inside or (tag == "table" and "sortable" in (given.get("class") or ""))
        if self.inside and tag == "tr":
            self.rows.append([])
        if self.inside and tag in ("td", "th"):
            self.open = True
            self.rows[-1].append(["", given.get("data-value")])

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "table"
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside and self.open:
            self.rows[-1][-1][0] += data


def of_page(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Label -> column -> [text, number]."""
    _, header, *body = SortableTable((folder / "report.html").read_text(encoding="utf-8")).rows
    titles = [text for text, _ in header]
    return {row[0][0]: dict(zip(titles, row, strict=True)) for row in body}


def of_tables(text: str, separator: str) -> dict[str, dict[str, str]]:
    """Label -> column -> cell, from all tables of a text whose cells are parted by `separator`."""
    found: dict[str, dict[str, str]] = {}
    titles: list[str] = []
    for line in text.splitlines():
        cells = [cell for cell in re.split(separator, line.strip(" |")) if cell]
        if cells[:1] == ["Method"]:
            titles = cells
        elif len(cells) == len(titles) > 1 and not set(line) <= set("| -:"):
            found.setdefault(cells[0], {}).update(dict(zip(titles, cells, strict=True)))
    return found


def everywhere(result: ComparisonResult, folder: Path) -> tuple[list[dict[str, str]], list[dict[str, dict[str, str]]]]:
    """The lines of the CSV, and the cells as terminal, Markdown and page have them."""
    console = Console(width=300, file=io.StringIO())
    console.print(comparison_table(result))
    terminal = console.file.getvalue()  # type: ignore[attr-defined]
    markdown = (folder / "comparison.md").read_text(encoding="utf-8")
    page = {label: {title: cell[0] for title, cell in row.items()} for label, row in of_page(folder).items()}
    lines = list(csv.DictReader(io.StringIO((folder / "comparison.csv").read_text(encoding="utf-8"))))
    return lines, [of_tables(terminal, r"\s{2,}"), of_tables(markdown, r" \| "), page]


@pytest.mark.parametrize("with_full", [True, False])
def test_page_table_markdown_and_csv_have_the_same_numbers(tmp_path: Path, with_full: bool) -> None:
    levels = {name: level for name, level in LEVELS.items() if with_full or name != "full"}
    result = compared(tmp_path, levels, Limits())
    lines, texts = everywhere(result, tmp_path)
    assert [line["name"] for line in lines] == list(levels)
    page = of_page(tmp_path)
    for line in lines:
        for title, column in NAMES.items():
            assert len({text[line["label"]][title] for text in texts}) == 1, (line["label"], title)
            assert (page[line["label"]][title][1] or "") == line[column], (line["label"], title)
        assert (line["relative_performance"] == "") == (not with_full)
        assert texts[0][line["label"]]["Relative perf."] == (
            f"{float(line['relative_performance']):.1f}" if with_full else units.MISSING
        )


def test_losses_by_source_are_the_same_means_everywhere(tmp_path: Path) -> None:
    content = invent(tmp_path, LEVELS)
    content["data"] = {"judged_on": "test", "judged_rows": 200}
    content["base"]["judged_loss_by_source"] = {"web": 4.5, "books": 3.25}
    for run in content["runs"]:
        run["judged_loss_by_source"] = {"web": run["valid_loss"] + run["seed"] / 7, "books": run["valid_loss"] / 2}
    result = ComparisonResult.model_validate(content)
    result.verdict = verdict(result, tmp_path)
    write_reports(result, tmp_path)
    lines, [terminal, markdown, _] = everywhere(result, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for line in lines:
        assert float(line["judged_loss[web]"]) == pytest.approx(LEVELS[line["name"]] + 1 / 7)
        cells = [units.number(float(line[f"judged_loss[{name}]"])) for name in ("web", "books")]
        for found in (terminal, markdown):
            assert [found[line["label"]][name] for name in ("web", "books")] == cells
        assert f'<th scope="row">{line["label"]}</th><td>{cells[0]}</td><td>{cells[1]}</td>' in page
        assert (line["base_judged_loss[web]"], line["base_judged_loss[books]"]) == ("4.5", "3.25")
    for found in (terminal, markdown):
        assert (found["Bare base"]["web"], found["Bare base"]["books"]) == ("4.500", "3.250")
    assert '<th scope="row">Bare base</th><td>4.500</td><td>3.250</td>' in page


def test_the_recommendation_names_the_tables_relative_performance_which_is_that_of_the_judged_loss(
    tmp_path: Path,
) -> None:
    result = compared(tmp_path, LEVELS, Limits(min_quality=1000))
    lines, [terminal, _, _] = everywhere(result, tmp_path)
    assert result.recommendation is not None
    assert result.verdict is not None
    means = result.verdict.means
    assert len(result.recommendation.excluded) == len(LEVELS)
    for line, broken in zip(lines, result.recommendation.excluded, strict=True):
        printed = re.search(r"has a relative performance of ([-\d.]+) \(100 is full", broken.text)
        assert printed is not None
        assert printed[1] == terminal[line["label"]]["Relative perf."]
        assert broken.value == float(line["relative_performance"])
        assert broken.value == pytest.approx(100 * (4.0 - means[line["name"]]) / (4.0 - means["full"]))
    assert "(base - full) of test loss" in (tmp_path / "comparison.md").read_text(encoding="utf-8")


def test_the_recommendation_bills_the_numbers_of_the_tables(tmp_path: Path) -> None:
    result = compared(tmp_path, LEVELS, Limits(tenants=10, max_latency_overhead=0.01))
    lines, [terminal, _, _] = everywhere(result, tmp_path)
    assert result.recommendation is not None
    slow = {broken.name: broken for broken in result.recommendation.excluded}
    assert set(slow) == set(LEVELS)
    for line in lines:
        assert slow[line["name"]].value == float(line["inference_overhead"])
    result = compared(tmp_path, LEVELS, Limits())
    assert result.recommendation is not None
    pick = next(line["label"] for line in lines if line["name"] == result.recommendation.pick)
    bill = next(reason.text for reason in result.recommendation.reasons if " at its peak" in reason.text)
    assert f"{terminal[pick]['Stored']} stored for one task" in bill
    assert f"{terminal[pick]['Time']} of training" in bill
    assert f"{terminal[pick]['Memory']} of memory at its peak" in bill  # nothing but training was measured here


def test_without_full_fine_tuning_nothing_is_called_relative_performance_but_the_column_that_says_it_is_undefined(
    tmp_path: Path,
) -> None:
    levels = {name: level for name, level in LEVELS.items() if name != "full"}
    result = compared(tmp_path, levels, Limits(min_quality=90))
    assert result.recommendation is not None
    assert result.recommendation.pick == "lora"
    texts = [broken.text for broken in result.recommendation.excluded]
    assert len(texts) == 3
    assert all("improves on the bare base by" in text and "relative performance" not in text for text in texts)
    assert "undefined here: full fine-tuning was not run" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
