"""Finding and naming run folders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tests.support import make_model, make_rows, make_tokenizer

from spectune.cli.runs import find_run, free_name, new_folder, output_folder, resumed
from spectune.cli.settings import Settings
from spectune.errors import ConfigError, DataError
from spectune.methods import LoRA
from spectune.training import TrainingConfig, train


def make_run(folder: Path, loss: float, age: int = 0) -> Path:
    (folder / "best").mkdir(parents=True)
    (folder / "best" / "spectune.json").write_text(json.dumps({"base_name": "gpt2"}))
    result = folder / "result.json"
    result.write_text(json.dumps({"valid_loss": loss}))
    os.utime(result, (1_000_000 - age, 1_000_000 - age))
    return folder


def test_names_count_up(tmp_path: Path) -> None:
    """Each is a folder from the moment on that it is chosen, and so nobody else's."""
    assert free_name("lora", tmp_path).name.endswith("-lora-1")
    assert new_folder("lora", tmp_path / "runs").name.endswith("-lora-1")
    assert new_folder("lora", tmp_path / "runs").name.endswith("-lora-2")
    assert new_folder("bitfit", tmp_path / "runs").name.endswith("-bitfit-1")
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_output_folder(tmp_path: Path) -> None:
    used, doing = tmp_path / "used", "spectune train"
    used.mkdir()
    (used / "x").touch()
    with pytest.raises(ConfigError, match="not empty"), output_folder(str(used), "lora", doing, resume=False):
        pass
    with output_folder(str(used), "lora", doing, resume=True) as folder:
        assert folder == used
    with pytest.raises(ConfigError, match="is a file"), output_folder(str(used / "x"), "lora", doing, resume=True):
        pass
    newest = r"name it with --output-dir. The newest is .*used"
    with pytest.raises(ConfigError, match=newest), output_folder(None, "lora", doing, resume=True, root=tmp_path):
        pass


@pytest.mark.parametrize("given", ["some/where", None])
def test_a_folder_in_which_nothing_was_written_is_not_left(tmp_path: Path, given: str | None) -> None:
    place = None if given is None else str(tmp_path / given)
    with output_folder(place, "lora", "spectune train", resume=False, root=tmp_path / "runs") as folder:
        assert (folder / ".lock").is_file()
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_result_is_named(tmp_path: Path, text: str) -> None:
    make_run(tmp_path / "run", 1.0)
    (tmp_path / "run" / "result.json").write_text(text)
    with pytest.raises(DataError, match=r"run/result\.json cannot be read as a run's result"):
        find_run(tmp_path / "run")


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


def collected(folder: Path, *assignments: str, **flags: object) -> Settings:
    return Settings.collect(None, list(assignments), {"output_dir": str(folder), "resume": True, **flags})


def test_resume_takes_from_the_folder_what_the_user_left_open(tmp_path: Path) -> None:
    recorded = {"model": "gpt2", "data": "a.jsonl", "method": {"name": "lora", "r": 2}, "max_steps": 3, "seed": 4}
    recorded |= {"row_shape": "prompt", "prompt_ends_with": ""}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
    found = resumed(collected(tmp_path))
    assert (found.base, found.text("data"), found.training().max_steps, found.training().seed) == (
        "gpt2",
        "a.jsonl",
        3,
        4,
    )
    [method] = found.methods(found.method_names(["bitfit"]))
    assert (method.name, method.model_dump()["r"]) == ("lora", 2)
    given = resumed(collected(tmp_path, "r=8", "max_steps=9", model="other"))
    assert (given.base, given.training().max_steps) == ("other", 9)
    [method] = given.methods(given.method_names([]))
    assert method.model_dump()["r"] == 8
    other = resumed(collected(tmp_path, method="bitfit"))
    assert [method.name for method in other.methods(other.method_names([]))] == ["bitfit"]
    assert resumed(collected(tmp_path / "new")).base == "spectune-tiny"
    assert resumed(Settings.collect(None, None, {"output_dir": str(tmp_path)})).base == "spectune-tiny"


def test_an_unfinished_comparison_says_how_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(DataError, match="spectune compare --resume --output-dir"):
        find_run(tmp_path)


def test_a_best_folder_alone_knows_how_rows_became_ids(tmp_path: Path) -> None:
    """`generate --run .../best` builds prompts as training did, without the run's config.yaml."""
    out, folder = tmp_path / "run", tmp_path / "alone"
    config = TrainingConfig(max_steps=1, separator=" => ", output_dir=out, per_device_train_batch_size=4)
    model = make_model()
    model.config._name_or_path = "some-base"
    train(model, make_tokenizer(), LoRA(r=1), make_rows(8), make_rows(4), config, console=Console(quiet=True))
    shutil.copytree(out / "best", folder)
    found = find_run(folder)
    assert found.base == "some-base"
    assert (found.config["separator"], found.config["max_length"]) == (" => ", 64)
