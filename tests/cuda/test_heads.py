"""Heads on a GPU: the losses of the CPU, with blocks that are recorded and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spectune.methods import METHODS, LoRA
from spectune.training import TrainingConfig, train
from tests.support import make_tokenizer
from tests.training.test_compiling import undropped
from tests.training.test_heads import TAGGED, TEXTS, make

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:TensorFloat32")]


def losses(folder: Path, kind: str, rows: Any, labels: list[str], method: Any, device: str, **how: Any) -> list[float]:
    config = TrainingConfig(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=0.01, eval_steps=2, **how
    )
    model = make(kind, labels).to(device)
    found = train(model, make_tokenizer(), method, rows[:16], rows[16:], config)
    return [found.train_loss, found.valid_loss]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_beside_a_head(method: Any, tmp_path: Path) -> None:
    given = "texts", TEXTS, ["dog", "fox"], undropped(method)
    expected = losses(tmp_path / "cpu", *given, "cpu")
    for name, how in (("graphs", {"cuda_graphs": True}), ("plain", {"cuda_graphs": False})):
        assert losses(tmp_path / name, *given, "cuda", **how) == pytest.approx(expected, rel=2e-3)


def test_tags_of_words(tmp_path: Path) -> None:
    given = "words", TAGGED, ["B-LOC", "O"], LoRA(r=2)
    expected = losses(tmp_path / "cpu", *given, "cpu")
    assert losses(tmp_path / "cuda", *given, "cuda") == pytest.approx(expected, rel=2e-3)
