"""A step that is begun behind one under way: runs come to the same, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from spectune.deltas import attached
from spectune.errors import DivergedError, InterruptedRun
from spectune.methods import FullFineTuning, LoRA
from spectune.training import RunResult, TrainingConfig, train
from spectune.training import loop as loop_module
from spectune.training.async_scalars import AsyncScalars
from spectune.training.run_folder import RunFolder
from tests.support import make_model, make_rows, make_tokenizer

QUIET = Console(quiet=True)
Weights = dict[str, torch.Tensor]


def settings(**changes: Any) -> TrainingConfig:
    given = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, **changes}
    return TrainingConfig(**given)


def run(method: Any, config: TrainingConfig) -> tuple[RunResult, Weights]:
    base = make_model(dropout=0.1)
    result = train(base, make_tokenizer(), method, make_rows(), make_rows(6), config, console=QUIET)
    return result, {name: t.clone() for name, t in attached(base)["default"].training_state_dict().items()}


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are begun ahead on the CPU too; most that were under way at once."""
    monkeypatch.setattr(loop_module, "steps_ahead", lambda _: 1)
    found = [0]
    begin = loop_module.Loop.begin

    def counting(self: Any, window: Any) -> None:
        begin(self, window)
        found[0] = max(found[0], len(self._in_flight))

    monkeypatch.setattr(loop_module.Loop, "begin", counting)
    return found


DROPPED, OFTEN = LoRA(r=2, lora_dropout=0.1), {"eval_steps": 3, "save_steps": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        pytest.param(DROPPED, OFTEN, id="lora-often"),
        pytest.param(FullFineTuning(), {}, id="full"),
        pytest.param(DROPPED, {}, id="lora", marks=pytest.mark.slow),
        pytest.param(FullFineTuning(), OFTEN, id="full-often", marks=pytest.mark.slow),
    ],
)
def test_a_run_ahead_is_the_run_that_waits(
    method: Any, changes: dict[str, Any], tmp_path: Path, most: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = run(method, settings(output_dir=tmp_path / "ahead", **changes))
    assert most == [2]
    monkeypatch.undo()
    waits = run(method, settings(output_dir=tmp_path / "waits", **changes))
    assert all(torch.equal(tensor, waits[1][name]) for name, tensor in ahead[1].items())
    assert logged(tmp_path / "ahead") == logged(tmp_path / "waits")
    assert ahead[0].best_step == waits[0].best_step
    assert ahead[0].train_loss == waits[0].train_loss


@pytest.mark.usefixtures("most")
@pytest.mark.parametrize("where", [pytest.param("begin", marks=pytest.mark.slow), "finish"])
def test_stopped_while_one_is_under_way(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(gradient_accumulation_steps=2)
    _, whole = run(LoRA(r=2), config.model_copy(update={"output_dir": tmp_path / "whole"}))
    step = getattr(loop_module.Loop, where)

    def interrupted(self: Any, *given: Any) -> Any:
        found = step(self, *given)
        if self.run.progress.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    parts = config.model_copy(update={"output_dir": tmp_path / "parts"})
    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Loop, where, interrupted)
        with pytest.raises(InterruptedRun, match=r"after step [23] of 6.*--resume"):
            run(LoRA(r=2), parts)
    result, resumed = run(LoRA(r=2), parts.model_copy(update={"resume": True}))
    assert result.steps == 6
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
    assert [line["step"] for line in logged(tmp_path / "parts") if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("ahead", [0, 1])
def test_nothing_is_stepped_behind_a_step_that_diverged(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "steps_ahead", lambda _: ahead)
    backward, seen, kept = loop_module.Loop.backward, list[Weights](), list[Weights]()

    def poisoned(self: Any, batch: Any, targets: int) -> torch.Tensor:
        seen.append({name: t.clone() for name, t in self.run.delta.training_state_dict().items()})
        loss = backward(self, batch, targets)
        return loss * float("nan") if len(seen) == 3 else loss

    monkeypatch.setattr(loop_module.Loop, "backward", poisoned)
    # the weights as they are when the run is given up, before it goes back to its best
    monkeypatch.setattr(RunFolder, "go_back", lambda self: kept.append(self.run.delta.training_state_dict()))
    with pytest.raises(DivergedError, match="the loss is nan in step 3"):
        run(LoRA(r=2), settings())
    assert len(seen) == 3 + ahead
    assert any(not torch.equal(tensor, seen[0][name]) for name, tensor in kept[0].items())
    assert all(torch.equal(tensor, seen[2][name]) for name, tensor in kept[0].items())


def test_scalars_are_copied_exactly() -> None:
    numbers = [torch.tensor(1 / 3), torch.tensor(1e-300, dtype=torch.float64), torch.tensor(float("inf"))]
    assert AsyncScalars(*numbers).values() == [float(number) for number in numbers]
