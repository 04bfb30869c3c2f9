"""A step is given to the device without a question: the host is ahead, and the run is the one that waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from spectune.deltas import Method, attached
from spectune.methods import METHODS
from spectune.training import TrainingConfig, train
from spectune.training import loop as loop_module
from tests.support import make_model, make_rows, make_tokenizer
from tests.training.test_compiling import undropped

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore:Synchronization debug mode"),
]


def run(method: type[Method], **changes: Any) -> tuple[list[float], dict[str, Tensor]]:
    model = make_model().cuda()
    losses: list[float] = []
    finish = loop_module.Loop.finish

    def kept(self: Any) -> float:
        losses.append(finish(self))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.Loop, "finish", kept)
        config = TrainingConfig(per_device_train_batch_size=4, max_steps=6, packing=False, **changes)
        train(
            model, make_tokenizer(), undropped(method), make_rows(), make_rows(6), config, console=Console(quiet=True)
        )
    return losses, {name: t.cpu() for name, t in attached(model)["default"].training_state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_asks_nothing(method: type[Method], monkeypatch: pytest.MonkeyPatch) -> None:
    begin, most = loop_module.Loop.begin, [0]

    def watched(self: Any, window: Any) -> None:
        # the first steps make what is made once
        torch.cuda.set_sync_debug_mode("error" if self.run.progress.step >= 2 else "default")
        try:
            begin(self, window)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        most[0] = max(most[0], len(self._in_flight))

    monkeypatch.setattr(loop_module.Loop, "begin", watched)
    run(method, cuda_graphs=False)
    assert most == [2]


@pytest.mark.parametrize("graphs", [False, True])
def test_a_run_ahead_is_the_run_that_waits(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in METHODS:
        ahead = run(method, cuda_graphs=graphs)
        with monkeypatch.context() as patch:
            patch.setattr(loop_module, "steps_ahead", lambda _: 0)
            waits = run(method, cuda_graphs=graphs)
        assert ahead[0] == pytest.approx(waits[0], rel=1e-5)
        for name, tensor in ahead[1].items():
            assert torch.allclose(tensor, waits[1][name], rtol=1e-4, atol=1e-6), f"{method.name} {name}"
