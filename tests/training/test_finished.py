"""A finished run that is asked to resume: "nothing to do" is said of one that is as it was written, and of no other."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spectune.errors import ConfigError, DataError
from spectune.methods import LoRA
from spectune.training import RunResult, TrainingConfig, train
from spectune.training.finished import check_finished
from tests.support import make_model, make_rows, make_tokenizer
from tests.support.hostile_files import HOSTILE_JSON

Copy = Callable[[], Path]


def run(folder: Path, **changes: Any) -> RunResult:
    settings = {
        "max_steps": 4,
        "eval_steps": 2,
        "learning_rate": 5e-2,
        "memory_check": "off",
        "load_best_at_end": False,
    }
    settings |= {"per_device_train_batch_size": 4, "output_dir": folder, **changes}
    given = make_model(), make_tokenizer(), LoRA(r=2), make_rows(), make_rows(6)
    return train(*given, TrainingConfig(**settings), console=Console(quiet=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def flip(path: Path, at: float = 0.5) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(at * len(raw))] ^= 1
    path.write_bytes(raw)


def kept_files(folder: Path) -> list[str]:
    """What a finished run leaves beside its checkpoints, which have digests of their own."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = [str(path.relative_to(folder)).replace("best-2/", "best/").replace("best-4/", "best/") for path in files]
    return sorted(name for name in names if not name.startswith("checkpoint-"))


def test_a_run_as_it_was_written_has_nothing_to_do(copy: Path) -> None:
    assert run(copy, resume=True) == RunResult.load(copy / "result.json")


def test_a_flipped_bit_anywhere_is_refused_by_the_files_name(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = kept_files(copy)
    assert {"best/adapter_model.safetensors", "best/adapter_config.json", "metrics.jsonl", "result.json"} <= set(names)
    for name in names:
        path, raw = copy / name, (copy / name).read_bytes()
        for at in (0.1, 0.5, 0.9):
            flip(path, at)
            if name == "config.yaml":  # it may be meant
                with caplog.at_level(logging.WARNING, "spectune"):
                    check_finished(copy)
                assert "config.yaml" in caplog.text
            else:
                with pytest.raises(DataError) as caught:
                    check_finished(copy)
                assert Path(name).name in str(caught.value)
                assert str(copy) in str(caught.value)
            path.write_bytes(raw)
    check_finished(copy)


def test_a_damaged_run_is_refused_with_what_to_remove_and_then_done_again(copy: Path, finished: Path) -> None:
    flip(copy / "metrics.jsonl")
    with pytest.raises(DataError, match=r"not taken for finished. Remove .*result\.json and what is named") as caught:
        run(copy, resume=True)
    assert "metrics.jsonl" in str(caught.value)
    (copy / "result.json").unlink()
    (copy / "metrics.jsonl").unlink()
    again, before = run(copy, resume=True), RunResult.load(finished / "result.json")
    assert (again.train_loss, again.valid_loss) == (before.train_loss, before.valid_loss)
    check_finished(copy)


def test_other_settings_are_said_before_damage(copy: Path) -> None:
    raw = (copy / "result.json").read_bytes()
    flip(copy / "result.json", raw.rindex(b'"sha256": "') / len(raw) + 15 / len(raw))  # a digit of the seal
    with pytest.raises(ConfigError, match="max_steps: 4 in the finished run, 5 now"):
        run(copy, resume=True, max_steps=5)


def test_without_seal_and_digests_a_result_is_taken_as_it_is(copy: Path) -> None:
    """As earlier versions wrote it, or whoever changed it on purpose."""
    path = copy / "result.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in ("sha256", "files")} | {"seed": 5}))
    flip(copy / "metrics.jsonl")
    check_finished(copy)
    assert RunResult.load(path).seed == 5


def test_a_result_whose_digests_are_of_files_elsewhere_is_refused(copy: Path) -> None:
    path = copy / "result.json"
    content = json.loads(path.read_text())
    for files in ({"../x": {"bytes": 1, "sha256": "0" * 64}}, {"x": 3}, [1], "x"):
        path.write_text(json.dumps({**content, "files": files}))
        with pytest.raises(DataError, match="its key 'files'"):
            check_finished(copy)


@pytest.mark.parametrize("kind", sorted(HOSTILE_JSON))
def test_a_hostile_result_is_one_sentence(tmp_path: Path, kind: str) -> None:
    path = HOSTILE_JSON[kind](tmp_path / "result.json")
    with pytest.raises(DataError) as caught:
        RunResult.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"steps": -1}, {"train_seconds": 1e308}, {"peak_memory_bytes": {"a": -1}}, {"steps": 2.5}, {"metrics": [1]}],
)
def test_numbers_out_of_range_are_refused(copy: Path, change: dict[str, Any]) -> None:
    path = copy / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=rf"not a run's result \({next(iter(change))}"):
        RunResult.load(path)
