"""`comparison.json` of earlier and later versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectune.comparing import Comparison
from spectune.errors import DataError
from spectune.files.metadata import sealed
from spectune.results import ComparisonResult

ARCHIVED = sorted(Path(__file__).parents[2].glob("docs/results/*.json"))


def written(folder: Path, content: Any) -> Path:
    (folder / "comparison.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("path", ARCHIVED, ids=lambda path: path.stem)
def test_published_comparisons_are_read_and_nothing_of_them_is_lost(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    result = ComparisonResult.model_validate(content)
    assert result.to_dict() == content
    assert len(result.runs_by_arm) == len(content["arms"])


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    content = {"runs": [{"name": "lora", "watts": 3}], "later": {"a": 1}, "format_version": 1}
    found = Comparison.load(written(tmp_path, content))
    found.result.save(tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8")) == sealed(content)


def test_what_is_null_is_missing() -> None:
    result = ComparisonResult.model_validate({"runs": None, "verdict": None, "data": {"judged_on": None}})
    assert (result.runs, result.verdict, result.data.judged_on) == ([], None, "valid")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"format_version": 2}, "format_version 2, and this version of spectune reads up to 1: install a newer one"),
        ({"format_version": "x"}, "format_version x"),
        ({"runs": [{"seed": "first"}], "failed": 1}, r"\(runs\.0\.seed: .*, and 1 more like it\)"),
        ([], "holds a list, expected an object"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Comparison.load(written(tmp_path, content))
