"""Nothing that writes a folder deletes what it did not write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectune.comparing import compare
from spectune.deltas import attach, detach, merge
from spectune.errors import ConfigError, DataError, WriteError
from spectune.methods import FullFineTuning, LoRA, PromptTuning
from spectune.storage import (
    atomic_folder,
    copy_model,
    write_gguf_lora,
    write_model,
    write_peft,
    write_prompt_embeds,
)
from spectune.training import TrainingConfig, train
from spectune.training.checkpoint import swap_best
from tests.files.children import files_of_at_most
from tests.support import make_model, make_rows, make_tokenizer

Write = Callable[[Any, Path], object]


def full(model: Any, folder: Path) -> object:
    return attach(model, FullFineTuning(), "task").save(folder)


def trained(model: Any, folder: Path) -> object:
    return train(model, make_tokenizer(), LoRA(r=1), make_rows(), config=TrainingConfig(max_steps=1, output_dir=folder))


def compared(model: Any, folder: Path) -> object:
    return compare(model, make_rows(), tokenizer=make_tokenizer(), methods=["bitfit"], output_dir=folder)


WRITERS: dict[str, Write] = {
    "save": lambda model, folder: attach(model, LoRA(r=1), "task").save(folder),
    "save of a model": full,
    "peft": lambda model, folder: write_peft(attach(model, LoRA(r=1), "task"), folder),
    "prompt": lambda model, folder: write_prompt_embeds(attach(model, PromptTuning(num_virtual_tokens=1)), folder),
    "model": lambda model, folder: write_model(model, make_tokenizer(), folder),
    "copy": lambda model, folder: copy_model(full(model, folder.parent / "full"), make_tokenizer(), folder),  # type: ignore[arg-type]
    "train": trained,
    "compare": compared,
}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("holds", ["a base", "a folder of PEFT's", "one file"])
def test_a_folder_that_holds_other_files_is_refused_as_it_is(writer: str, holds: str, tmp_path: Path) -> None:
    """Files of the very names that would be written are other files too: a base's checkpoint, somebody's adapter."""
    folder, model = tmp_path / "folder", make_model()
    if holds == "a base":
        write_model(model, make_tokenizer(), folder)
    elif holds == "a folder of PEFT's":
        write_peft(attach(model, LoRA(r=2), "other"), folder)
        detach(model, "other")
    else:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    before = content(folder)
    with pytest.raises(ConfigError, match="is not empty"):
        WRITERS[writer](model, folder)
    assert content(folder) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"folder", "full"}


@pytest.mark.parametrize("writer", ["save", "save of a model", "peft", "prompt", "model", "copy", "gguf"])
def test_a_full_disk_is_said_of_the_folder_and_nothing_stays(writer: str, tmp_path: Path) -> None:
    model = make_model()
    if writer == "copy":
        full(model, tmp_path / "full")
    write: Write = {
        **WRITERS,
        "gguf": lambda model, folder: write_gguf_lora(attach(model, LoRA(r=2), "task"), folder),
        "copy": lambda _, folder: copy_model(tmp_path / "full", make_tokenizer(), folder),
    }[writer]
    with files_of_at_most(2**9), pytest.raises(WriteError, match=f"^{tmp_path / 'folder'} could not be written"):
        write(model, tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} <= {"full"}


def test_a_model_that_was_changed_is_not_copied(tmp_path: Path) -> None:
    full(make_model(), tmp_path / "full")
    weights = tmp_path / "full" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match="SHA-256"):
        copy_model(tmp_path / "full", make_tokenizer(), tmp_path / "copy")
    weights.unlink()
    with pytest.raises(DataError, match="is missing"):
        copy_model(tmp_path / "full", make_tokenizer(), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_saved_delta_is_replaced_and_what_was_put_beside_it_is_not(tmp_path: Path) -> None:
    model = make_model()
    delta = attach(model, LoRA(r=1), "task")
    delta.save(tmp_path / "task")
    delta.save(tmp_path / "task")
    # names that a save of another method has written, elsewhere
    for name in ("config.json", "model-of-mine.safetensors", "notes.txt"):
        (tmp_path / "task" / name).write_text("mine")
        before = content(tmp_path / "task")
        with pytest.raises(ConfigError, match=name):
            delta.save(tmp_path / "task")
        assert content(tmp_path / "task") == before
        (tmp_path / "task" / name).unlink()


def test_an_empty_folder_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_peft(attach(make_model(), LoRA(r=1), "task"), tmp_path / "empty")
    assert sorted(content(tmp_path / "empty")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_run_removes_only_bests_and_checkpoints_of_its_own(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    delta = attach(model, LoRA(r=1), "task")
    for name in ("best-of-mine", "best-7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    for step in (1, 2):
        swap_best(tmp_path, delta, step, tokenizer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best-2", "best-7", "best-of-mine"]


def test_what_is_refused_is_refused_before_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"), atomic_folder(tmp_path / "folder"):
        pytest.fail("nothing is to be written")


def test_a_merged_model_is_not_written_over_the_base_it_came_from(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    write_model(model, tokenizer, tmp_path / "base")
    attach(model, LoRA(r=1), "task")
    with pytest.raises(ConfigError, match="is not empty"):
        write_model(merge(model, "task", check=False), tokenizer, tmp_path / "base")
