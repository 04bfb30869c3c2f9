"""A base that lacks a weight is refused by every command, by name; and taken, and said so, where that is meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.cli.conftest import Spectune

GONE, ALLOW = "transformer.h.1.mlp.c_fc.weight", "--allow-missing-weights"
SHORT = ("--device", "cpu", "--set", "max_steps=2")


def lose(base: Path) -> None:
    state = load_file(base / "model.safetensors")
    del state[GONE]
    save_file(state, base / "model.safetensors", {"format": "pt"})


@pytest.fixture
def halved(base: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(base, tmp_path / "halved"))
    lose(folder)
    return folder


def test_no_command_takes_a_base_that_lacks_a_weight(spectune: Spectune, base: Path, halved: Path, rows: Path) -> None:
    trained = spectune("train", "--model", base, "--data", rows, *SHORT, "--set", "save_steps=1", "--output-dir", "run")
    assert trained.exit_code == 0, trained.stderr
    for command in (("train", "--data", rows), ("compare", "--data", rows, "--quick"), ("eval", "--data", rows),
                    ("generate", "x"), ("train", "--data", rows, "--dry-run"),
                    ("eval", "--run", "run"), ("generate", "x", "--run", "run"),
                    ("train", "--resume", "--output-dir", "run", "--set", "max_steps=4")):  # fmt: skip
        result = spectune(*command, "--model", halved)
        assert result.exit_code == 3, (command, result.stderr)
        assert GONE in result.stderr, command
        assert "model.safetensors" in result.stderr, command


def test_with_the_flag_it_is_one_base_for_every_command(spectune: Spectune, halved: Path, rows: Path) -> None:
    trained = spectune("train", "--model", halved, "--data", rows, *SHORT, "--output-dir", "run", ALLOW)
    assert trained.exit_code == 0, trained.stderr
    assert "allow_missing_weights: true" in Path("run/config.yaml").read_text()
    for command in (("eval", "--run", "run"), ("merge", "--run", "run"),
                    ("train", "--resume", "--output-dir", "run")):  # fmt: skip
        found = spectune(*command)
        assert found.exit_code == 0, (command, found.stderr)
