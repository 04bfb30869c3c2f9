"""Bases and folders: what is missing or damaged is named, and nothing is half written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spectune.deltas import attach, attached
from spectune.errors import ConfigError, DataError
from spectune.methods import FullFineTuning, LoRA
from spectune.storage import atomic_folder, atomic_write_text, load, load_delta, resolve_device, resolve_dtype
from tests.support import make_model, make_tokenizer


def test_a_base_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"(?s)neither a local folder.*local folder.*HF_HOME"):
        load("nobody/no-such-model")


def test_a_folder_without_a_base_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"is a folder, but no base.*notes\.txt"):
        load(tmp_path)


def test_a_local_folder(tmp_path: Path) -> None:
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path)
    assert model.dtype == torch.float32  # auto, on a CPU
    assert not model.training
    assert len(tokenizer) == 300
    assert load(tmp_path, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_devices_and_dtypes() -> None:
    cuda = torch.device("cuda")
    assert resolve_dtype("auto", torch.device("cpu"), torch.bfloat16) == torch.float32
    assert resolve_dtype("auto", cuda, torch.bfloat16) == torch.bfloat16
    assert resolve_dtype("auto", cuda, torch.float16) == torch.bfloat16
    assert resolve_dtype("auto", cuda, None) == torch.float32
    with pytest.raises(ConfigError, match="unknown"):
        resolve_dtype("fp8", cuda)
    with pytest.raises(ConfigError, match="unknown"):
        resolve_device("gpu")


def test_damaged_folders(tmp_path: Path) -> None:
    model = make_model()
    attach(model, LoRA(r=2), "task").save(tmp_path / "task")
    weights = tmp_path / "task" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:100], b"\xff" * 64, whole[:-5]):
        weights.write_bytes(broken)
        with pytest.raises(DataError, match="safetensors"):
            load_delta(make_model(), tmp_path / "task")
    weights.unlink()
    with pytest.raises(DataError, match="is missing"):
        load_delta(make_model(), tmp_path / "task")
    (tmp_path / "task" / "spectune.json").write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        load_delta(make_model(), tmp_path / "task")
    for nothing in (tmp_path, tmp_path / "none"):
        other = make_model()
        with pytest.raises(DataError):
            load_delta(other, nothing)
        assert not attached(other)


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    model = make_model()
    delta = attach(model, LoRA(r=2), "task")
    delta.save(tmp_path / "task")
    delta.save(tmp_path / "task")
    assert sorted(p.name for p in (tmp_path / "task").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "spectune.json",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["task"]


def test_a_failure_while_writing_leaves_the_old(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "f", "old")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("old")

    def fill() -> None:
        with atomic_folder(tmp_path / "d", replaces=lambda _, entry: entry.name == "x") as temporary:
            (temporary / "x").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill()
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(tmp_path / "f", "\ud800")
    assert (tmp_path / "d" / "x").read_text() == "old"
    assert (tmp_path / "f").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "f"]


def test_a_folder_names_its_base_as_every_machine_knows_it(tmp_path: Path) -> None:
    model, _ = load("spectune-tiny")
    attach(model, LoRA(r=1), "task").save(tmp_path / "task")
    ours = json.loads((tmp_path / "task" / "spectune.json").read_text())
    peft = json.loads((tmp_path / "task" / "adapter_config.json").read_text())
    assert ours["base_name"] == peft["base_model_name_or_path"] == "spectune-tiny"


def test_a_base_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    attach(make_model(), FullFineTuning(), "task").save(tmp_path / "task")
    with pytest.raises(DataError, match=r"task.*has no tokenizer.*tokenizer\.save_pretrained"):
        load(tmp_path / "task")
