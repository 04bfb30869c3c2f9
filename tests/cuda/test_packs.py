"""Packs on CUDA: flash attention document by document, in compiled blocks, beside the same rows padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console
from torch._dynamo.utils import counters

from spectune.deltas import Method
from spectune.methods import METHODS
from spectune.training import TrainingConfig, train
from spectune.training import loop as loop_module
from spectune.training.step_batches import Batches
from tests.support import make_model, make_rows, make_tokenizer
from tests.training.test_compiling import fresh_compiler, undropped

__all__ = ["fresh_compiler"]

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:TensorFloat32")]


def losses_and_graphs(method: type[Method], patch: pytest.MonkeyPatch, **changes: Any) -> list[tuple[float, int]]:
    """Each step's loss, and how many graphs there were by then."""
    found: list[tuple[float, int]] = []
    finish = loop_module.Loop.finish

    def kept(self: Any) -> float:
        found.append((finish(self), counters["stats"]["unique_graphs"]))
        return found[-1][0]

    with patch.context() as inside:
        inside.setattr(loop_module.Loop, "finish", kept)
        config = TrainingConfig(per_device_train_batch_size=6, max_steps=10, cuda_graphs=False, **changes)
        model, rows = make_model(dtype=torch.bfloat16).cuda(), make_rows(60)
        train(model, make_tokenizer(), undropped(method), rows, rows[:6], config, console=Console(quiet=True))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_packs_lose_nothing_and_share_graphs(method: type[Method], monkeypatch: pytest.MonkeyPatch) -> None:
    padded = losses_and_graphs(method, monkeypatch, packing=False)
    kernels: list[Any] = []
    listening = Batches.listening
    monkeypatch.setattr(
        Batches, "listening", lambda self, model: (kernels.append(self.packing.kernel), listening(self, model))[1]
    )
    counters.clear()
    packed = losses_and_graphs(method, monkeypatch, packing=True, torch_compile=True)
    assert kernels
    assert None not in kernels
    assert [loss for loss, _ in packed] == pytest.approx([loss for loss, _ in padded], rel=2e-2)
    # sizes are constants to the compiler at first, and taken to vary once others come
    graphs = [count for _, count in packed]
    assert graphs[-1] == graphs[6], graphs
