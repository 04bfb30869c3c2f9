"""What is made of a forged comparison: no terminal, browser or spreadsheet obeys anything in it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from spectune.files.plain_text import plain
from spectune.reporting.spreadsheets import FORMULAS
from tests.reporting.from_content import comparison_table, write_reports
from tests.reporting.sample import sample

EVIL = (
    '=HYPERLINK("http://evil/")|<img src=http://evil/x.png onerror=alert(1)>[a](javascript:alert(1))![b](//evil/x.png)'
    "`$\\frac{1}$\x1b]52;c;eA==\x07\x9b31m\u202e\u2028\r\n# evil\n"
)
#: names of keys whose values are words of a list, or of numbers that readers choose by
WORDS = {"judged_on", "decided_by", "measure", "task_type", "edge", "format_version", "loss_unit"}
#: mappings whose keys are the file's own, and not the format's
OPEN = {"metrics", "settings", "judged_loss_by_source", "sources", "higher_is_better", "environment", "machine_load"}


def forged(value: Any, key: str = "") -> Any:
    """Every text with something hostile before it, the same everywhere, so that names still name the same."""
    if isinstance(value, str):
        return value if key in WORDS else EVIL + value
    if isinstance(value, dict):
        return {EVIL + name if key in OPEN else name: forged(inner, name) for name, inner in value.items()}
    return [forged(inner, key) for inner in value] if isinstance(value, list) else value


def small(content: dict[str, Any]) -> dict[str, Any]:
    """Two arms of it, and what is said of these."""
    kept = ("full", "lora")
    content = {**content, "runs": [run for run in content["runs"] if run["name"] in kept]}
    for part in ("arms", "failed", "curves"):
        content[part] = [entry for entry in content.get(part, []) if entry["name"] in kept]
    content["searches"] = {}
    content["failed"] = [{"name": "lora", "method": "lora", "label": "LoRA", "seed": 9, "reason": "-1+1 no memory"}]
    content["command"] = ["spectune", "compare", "--data", "a b"]
    content["mystery"] = {"later": "versions"}
    return {**content, "verdict": None, "recommendation": None}


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    return dict(forged(small(sample())))


@pytest.fixture(scope="module")
def folder(case: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forged")
    write_reports(case, folder)
    return folder


def test_nothing_in_the_files_is_a_control_or_turns_the_text(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.suffix in (".csv", ".md", ".html", ".svg")]
    assert len(files) > 8
    for path in files:
        text = path.read_text("utf-8")
        assert plain(text) == text, path


def test_no_cell_is_a_formula_and_numbers_stay_numbers(folder: Path) -> None:
    for name in ("comparison.csv", "runs.csv"):
        header, *lines = csv.reader(io.StringIO((folder / name).read_text("utf-8")))
        assert lines
        cells = [cell for line in [header, *lines] for cell in line]
        text = [cell for cell in cells if not re.fullmatch(r"-?[\d.e+-]*|-?inf|nan|True|False", cell)]
        assert not [cell for cell in text if cell.startswith((*FORMULAS, "\t", "\r", "\n"))]
        assert any(cell.startswith("'=HYPERLINK") for cell in text)
        assert float(lines[0][header.index("valid_loss")]) > 0


def test_markdown_has_no_link_picture_or_tag_of_it_and_tables_keep_their_columns(folder: Path) -> None:
    text = (folder / "comparison.md").read_text("utf-8")
    assert re.findall(r"(?<!\\)!\[.*?\]\(.*?\)", text) == ["![figure](shares-and-performance.svg)"]
    without_code = re.sub(r"(?<!\\)`[^`]*(?<!\\)`", "", text)
    assert not re.search(r"(?<!\\)\](?=\()", without_code.replace("![figure](shares", ""))
    assert "<" not in without_code
    assert "# evil" not in [line.strip() for line in text.splitlines()]
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    assert tables
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag] += 1
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action") or name[:2] == "on"]


def test_the_page_has_the_elements_of_an_honest_one(folder: Path, tmp_path: Path) -> None:
    write_reports(small(sample()), tmp_path)
    of = {}
    for name, place in (("forged", folder), ("honest", tmp_path)):
        of[name] = Tags()
        of[name].feed((place / "report.html").read_text("utf-8"))
    assert {tag for tag, _ in of["forged"].found.items()} == {tag for tag, _ in of["honest"].found.items()}
    assert of["forged"].found["img"] == 0
    assert of["forged"].found["script"] == 1
    assert all(link.startswith("#") or link == "data:," for link in of["forged"].links)


def test_figures_are_whole_and_ask_for_nothing(folder: Path) -> None:
    for path in folder.rglob("*.svg"):
        for element in ElementTree.fromstring(path.read_text("utf-8")).iter():
            assert element.tag.rpartition("}")[2] not in ("script", "image", "foreignObject", "a")
            for name, value in element.attrib.items():
                assert not name.rpartition("}")[2].startswith("on")
                assert "evil" not in value


def test_the_table_on_a_terminal_is_plain_and_no_longer_than_it_need_be(case: dict[str, Any]) -> None:
    huge = json.loads(json.dumps(case).replace("no memory", "x" * 1_000_000))
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=False).print(comparison_table(huge))
    assert plain(out.getvalue()) == out.getvalue()
    assert len(out.getvalue()) < 60_000
