"""Finding and naming run folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from spectune.cli.runs import find_run, new_folder, output_folder
from spectune.errors import ConfigError, DataError


def make_run(folder: Path, loss: float, age: int = 0) -> Path:
    (folder / "best").mkdir(parents=True)
    (folder / "best" / "spectune.json").write_text(json.dumps({"base_name": "gpt2"}))
    result = folder / "result.json"
    result.write_text(json.dumps({"valid_loss": loss}))
    os.utime(result, (1_000_000 - age, 1_000_000 - age))
    return folder


def test_names_count_up(tmp_path: Path) -> None:
    first = new_folder("lora", tmp_path)
    assert first.name.endswith("-lora-1")
    first.mkdir()
    assert new_folder("lora", tmp_path).name.endswith("-lora-2")
    assert new_folder("bitfit", tmp_path).name.endswith("-bitfit-1")


def test_output_folder(tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "x").touch()
    with pytest.raises(ConfigError, match="not empty"):
        output_folder(str(used), "lora", resume=False)
    assert output_folder(str(used), "lora", resume=True) == used
    with pytest.raises(ConfigError, match="is a file"):
        output_folder(str(used / "x"), "lora", resume=True)
    with pytest.raises(ConfigError, match=r"name it with --output-dir. The newest is .*used"):
        output_folder(None, "lora", resume=True, root=tmp_path)


def test_newest_run(tmp_path: Path) -> None:
    make_run(tmp_path / "old", 1.0, age=100)
    newest = make_run(tmp_path / "new", 2.0)
    (tmp_path / "unfinished").mkdir()
    found = find_run(None, tmp_path)
    assert (found.folder, found.delta_folder, found.base) == (newest, newest / "best", "gpt2")


def test_best_of_a_comparison(tmp_path: Path) -> None:
    make_run(tmp_path / "c" / "runs" / "lora", 2.0)
    best = make_run(tmp_path / "c" / "runs" / "full", 1.0, age=50)
    assert find_run(tmp_path / "c").folder == best
    assert find_run(None, tmp_path).folder == best


def test_a_delta_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    found = find_run(tmp_path)
    assert (found.delta_folder, found.base) == (tmp_path, "org/base")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`spectune train` or `spectune compare` makes one"):
        find_run(None, tmp_path / "runs")
    with pytest.raises(DataError, match="not a folder"):
        find_run(tmp_path / "no")
    with pytest.raises(DataError, match="no finished run"):
        find_run(tmp_path)
