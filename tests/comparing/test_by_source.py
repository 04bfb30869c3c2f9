"""A comparison on several sources: losses by source of every arm and of the bare base, and the same mixture for all."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spectune.data import Source
from spectune.errors import ConfigError
from spectune.evaluation import loss_by_source, read_rows
from spectune.results import ComparisonResult
from tests.comparing.small import run
from tests.support import make_rows

pytestmark = pytest.mark.usefixtures("short_measurements")


def sources(weight: float = 2) -> list[Source]:
    return [Source(make_rows(10), 0.5, "web"), Source(make_rows(6), weight, "books")]


TEST = [Source(make_rows(4), name="web"), Source(make_rows(9)[4:], name="a | b, <i>")]


def test_losses_by_source_are_in_every_file_and_follow_from_the_rows(tmp_path: Path, with_reports: None) -> None:
    out = Console(file=io.StringIO(), width=200)
    folder = tmp_path / "c"
    given: dict[str, Any] = {"methods": ["bitfit", "ia3"], "seeds": 2, "train_rows": sources(), "test_rows": TEST}
    comparison = run(folder, console=out, **given)
    said = "10 rows of web (x 0.5), 6 of books (x 2): 17 examples an epoch"
    assert said in out.file.getvalue()  # type: ignore[attr-defined]
    content = json.loads((folder / "comparison.json").read_text())
    names = [source.label for source in TEST]
    of_run = {run["rows_file"]: run["judged_loss_by_source"] for run in content["runs"]}
    for path, found in of_run.items():
        assert found == loss_by_source(read_rows(folder / path))
        assert list(found) == names
    base = loss_by_source(read_rows(folder / "base" / "rows.jsonl"))
    assert content["base"]["judged_loss_by_source"] == base
    assert content["data"]["mixture"] == said
    assert content["data"]["sources"]["books"] == {"rows": 6, "weight": 2, "examples": 12}
    assert content["runs"][0]["train_sources"] == content["data"]["sources"]

    markdown, page = (folder / "comparison.md").read_text(), (folder / "report.html").read_text()
    lines = list(csv.DictReader(io.StringIO((folder / "comparison.csv").read_text())))
    assert [line["name"] for line in lines] == ["bitfit", "ia3"]
    for line in lines:
        for name in names:
            runs = [found[name] for path, found in of_run.items() if path.startswith(f"runs/{line['name']}/")]
            assert float(line[f"judged_loss[{name}]"]) == pytest.approx(statistics.fmean(runs))
            assert float(line[f"base_judged_loss[{name}]"]) == base[name]
    for text in (f"Trained on {said}.", "Test loss by source", "Bare base"):
        assert text in markdown
        assert text in page
    assert "| Method | web | a \\| b, &lt;i> |" in markdown
    assert "<i>" not in page
    runs_csv = csv.DictReader(io.StringIO((folder / "runs.csv").read_text()))
    assert [float(line["judged_loss[web]"]) for line in runs_csv] == [found["web"] for found in of_run.values()]

    with pytest.raises(ConfigError, match="weight of data books: 2 in the comparison, 3 now"):
        run(folder, resume=True, **{**given, "train_rows": sources(3)})
    again = run(folder, resume=True, **given)
    assert again.content == comparison.content


def test_rows_of_one_source_have_no_table_of_their_own(tmp_path: Path, with_reports: None) -> None:
    folder = tmp_path / "c"
    run(folder, methods=["bitfit"])
    assert "by source" not in (folder / "comparison.md").read_text()
    assert "by source" not in (folder / "report.html").read_text()
    assert "judged_loss[" not in (folder / "comparison.csv").read_text()
    result = ComparisonResult.load(folder)
    assert result.data.sources == result.base.judged_loss_by_source == {}
    older = result.to_dict()
    for entry in (older["base"], *older["runs"]):
        entry.pop("judged_loss_by_source", None)
    assert ComparisonResult.model_validate(older).runs[0].judged_loss_by_source == {}
