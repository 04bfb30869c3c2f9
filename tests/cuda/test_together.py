"""Runs that share passes on a GPU: what each learns, captured or not, and that a step asks the device nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console

from spectune.deltas import Method, attached
from spectune.methods import LoRA, PrefixTuning, PromptTuning, method_from_name
from spectune.training import Run, TrainingConfig, train, train_together
from spectune.training.rounds import Rounds
from tests.support import make_model, make_rows, make_tokenizer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore:Synchronization debug mode"),
]
QUIET, TOKENIZER = Console(quiet=True), make_tokenizer()
METHODS: list[Method] = [
    LoRA(r=2), method_from_name("dora", r=3), method_from_name("adapter", bottleneck_dim=4, dropout=0.0),
    method_from_name("bitfit"), method_from_name("ia3"), method_from_name("ln"), PrefixTuning(num_virtual_tokens=3),
    PromptTuning(num_virtual_tokens=2),
]  # fmt: skip


def runs(**settings: Any) -> list[Run]:
    return [
        Run(method, make_rows(16 + n), make_rows(5), TrainingConfig(
            seed=n, max_steps=6 + n % 3, per_device_train_batch_size=2 + n % 2, memory_check="off", packing=False,
            learning_rate=1e-3, **settings), f"run-{n}")
        for n, method in enumerate(METHODS)
    ]  # fmt: skip


@pytest.mark.parametrize("graphs", [False, True])
def test_each_of_eight_methods_learns_in_shared_passes_what_it_does_alone(graphs: bool) -> None:
    model = make_model().cuda()
    found = train_together(model, TOKENIZER, runs(cuda_graphs=graphs), console=QUIET)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    for run, result in zip(runs(cuda_graphs=False), found, strict=True):
        assert isinstance(run.method, Method)
        alone = make_model().cuda()
        expected = train(alone, TOKENIZER, run.method, run.train_rows, run.valid_rows, run.config, console=QUIET)
        assert result.valid_loss == pytest.approx(expected.valid_loss, abs=2e-3), result.method
        assert result.train_loss == pytest.approx(expected.train_loss, abs=2e-3), result.method
        assert attached(model)[result.name].method == run.method


@pytest.mark.parametrize("graphs", [False, True])
def test_a_shared_step_asks_the_device_nothing(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, taken = Rounds._launch, list[int]()

    def watched(self: Any, *given: Any) -> Any:
        # the first steps trace, capture and prove; runs end from the sixth on
        torch.cuda.set_sync_debug_mode("error" if len(taken) in (4, 5) else "default")
        try:
            return launch(self, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            taken.append(len(taken))

    monkeypatch.setattr(Rounds, "_launch", watched)
    train_together(make_model().cuda(), TOKENIZER, runs(cuda_graphs=graphs), console=QUIET)
    assert len(taken) == 8
