"""`spectune recommend` as a user runs it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Spectune
from tests.comparing.invented import invent
from tests.comparing.invented import judged as verdict

from spectune.cli.limits import share as fraction
from spectune.errors import ConfigError
from spectune.files.strict_json import strict_json
from spectune.sizes import bytes_of as size

LEVELS = {"full": 1.0, "lora": 1.0, "adapter": 1.002, "bitfit": 1.06}


def comparison(folder: Path, levels: dict[str, float] = LEVELS, *, old: bool = False) -> Path:
    folder.mkdir(parents=True)
    content: dict[str, Any] = {**invent(folder, levels, rows=100), "data": {"judged_on": "valid"}}
    content["verdict"] = None if old else verdict(content, folder)
    (folder / "comparison.json").write_text(strict_json(content))
    return folder


def test_the_newest_comparison(spectune: Spectune) -> None:
    old = comparison(Path("runs/old"), {"bitfit": 1.0, "prompt": 2.0})
    os.utime(old / "comparison.json", (1, 1))
    comparison(Path("runs/new"))
    result = spectune("recommend")
    assert result.exit_code == 0
    assert result.stdout.startswith("Recommended: lora\n")
    assert "proved by runs/lora/seed-0-ab12cd34/rows.jsonl" in result.stdout
    assert "from runs/new" in result.stderr
    assert "Recommended: bitfit" in spectune("recommend", "--run", old).stdout


def test_limits_and_json(spectune: Spectune) -> None:
    comparison(Path("runs/c"), old=True)  # a comparison without a verdict gets one
    limits = ["--max-memory", "16.5GB", "--tenants", "10", "--max-latency-overhead", "25%"]
    limits += ["--max-stored-bytes", "5GiB", "--min-quality", "90"]
    result = spectune("recommend", "--json", *limits)
    found = json.loads(result.stdout)
    assert found["folder"] == "runs/c"
    assert found["pick"] == "adapter"
    assert found["limits"] == {
        "max_memory_bytes": 16_500_000_000,
        "max_latency_overhead": 0.25,
        "tenants": 10,
        "max_stored_bytes": 5 * 2**30,
        "min_quality": 90.0,
    }
    assert found["verdict"][0]
    tight = spectune("recommend", "--max-memory", "1GB")
    assert tight.exit_code == 0
    assert "No method keeps all limits" in tight.stdout
    assert "Left out by your limits" in tight.stdout


def test_without_limits_those_of_the_comparison_count(spectune: Spectune) -> None:
    folder = comparison(Path("runs/c"))
    content = json.loads((folder / "comparison.json").read_text())
    content["recommendation"] = {"limits": {"max_memory_bytes": 1}}
    (folder / "comparison.json").write_text(strict_json(content))
    assert json.loads(spectune("recommend", "--json").stdout)["limits"] == {"max_memory_bytes": 1}
    assert json.loads(spectune("recommend", "--json", "--tenants", "2").stdout)["limits"] == {"tenants": 2}


def test_guide_without_a_comparison(spectune: Spectune) -> None:
    result = spectune("recommend")
    assert result.exit_code == 0
    assert "No question was answered" in result.stdout
    assert "spectune compare --data train.jsonl" in result.stdout
    asked = spectune("recommend", "--rows", "800", "--tasks", "20", "--compute", "16GiB", "--must-merge", "--json")
    found = json.loads(asked.stdout)
    assert found["answers"] == {"rows": 800, "tasks": 20, "memory_bytes": 16 * 2**30, "must_merge": True}
    assert found["shortlist"] == ["lora", "bitfit", "dora", "oft", "miss", "ln"]


def test_a_guides_flag_asks_the_guide_though_there_is_a_comparison(spectune: Spectune) -> None:
    comparison(Path("runs/c"))
    result = spectune("recommend", "--max-quality", "--compute", "high")
    assert "highest quality: " in result.stdout
    assert "much memory, all weights" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--tenants", "3"], 2, "`spectune compare` makes one"),
        (["--rows", "5", "--tenants", "3"], 2, "--rows ask the textbook's guide, --tenants a comparison"),
        (["--rows", "5", "--run", "."], 2, "--run a comparison"),
        (["--run", "nowhere"], 3, "nowhere is not a folder"),
        (["--compute", "lots"], 2, "expected a size above zero"),
        (["--max-memory", "24 bananas"], 2, "--max-memory 24 bananas: expected a size above zero"),
        (["--max-latency-overhead", "much"], 2, "expected a share such as 0.1, or 10%"),
        (["--tenants", "0"], 2, "Invalid value for '--tenants'"),
        (["--min-quality", "nan"], 2, "--min-quality nan"),
    ],
)
def test_wrong_flags(spectune: Spectune, arguments: list[str], code: int, said: str) -> None:
    result = spectune("recommend", *arguments)
    assert result.exit_code == code
    assert said in result.stderr


def test_a_damaged_comparison(spectune: Spectune) -> None:
    Path("runs/c").mkdir(parents=True)
    for text in ("{", "[]", '"text"'):
        Path("runs/c/comparison.json").write_text(text)
        assert spectune("recommend").exit_code == 3


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("24GiB", 24 * 2**30), ("2 GB", 2 * 10**9), ("500mb", 5 * 10**8), ("1.5kB", 1500), ("77", 77), ("1TiB", 2**40)],
)
def test_sizes(text: str, wanted: int) -> None:
    assert size(text, "--x") == wanted


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "0", "0.0GB", "1XB", "1 2GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a size"):
        size(text, "--x")


@pytest.mark.parametrize(("text", "wanted"), [("0.1", 0.1), ("10%", 0.1), (".5", 0.5), (" 5 % ", 0.05), ("0", 0.0)])
def test_fractions(text: str, wanted: float) -> None:
    assert fraction(text) == pytest.approx(wanted)
