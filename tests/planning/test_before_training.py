"""What training does with the plan: stored beside what was measured, and a refusal where it does not fit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from spectune.blocks.execution import Execution
from spectune.blocks.recompute import recomputing
from spectune.deltas import attach
from spectune.errors import DoesNotFitError
from spectune.methods import LoRA, method_from_name
from spectune.planning import plan
from spectune.training import RunResult, TrainingConfig, prediction, train
from spectune.training.decisions import decide_run
from spectune.training.distribution import World
from spectune.training.prepare import prepare
from tests.support import make_model, make_rows, make_tokenizer


def run(method: Any = "lora", **settings: Any) -> RunResult:
    chosen = method_from_name(method) if isinstance(method, str) else method
    config = TrainingConfig(**{"max_steps": 2, "per_device_train_batch_size": 8, **settings})
    rows = make_rows(32)
    return train(make_model(), make_tokenizer(), chosen, rows[:24], rows[24:], config, console=Console(quiet=True))


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "one-step": {"max_steps": 1},
}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        pytest.param(
            method,
            WAYS[way],
            id=f"{method}-{way}",
            marks=[] if "lora" in method or way == "plain" else pytest.mark.slow,
        )
        for method in ("full", "prefix", "lora")
        for way in WAYS
    ],
)
def test_the_prediction_stands_beside_what_was_measured(method: str, settings: dict[str, Any]) -> None:
    result = run(method, **settings)
    assert result.memory_prediction_source == "trace"
    predicted = result.predicted_memory_bytes
    assert predicted["peak_allocated"] == pytest.approx(result.peak_memory_bytes["train_allocated"], rel=0.03)
    assert set(predicted) == {
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "workspace",
        "peak_allocated",
        "peak_reserved",
        "validation",
    }


def test_a_run_that_does_not_fit_is_refused_before_its_first_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prediction, "free_memory", lambda device: 2_000_000)
    with pytest.raises(DoesNotFitError) as error:
        run(LoRA(r=3), output_dir=tmp_path / "run")
    assert error.value.exit_code == 4
    message = str(error.value)
    for part in (
        "LoRA with a batch of 8 rows of",
        "is free for it",
        "largest term",
        "per_device_train_batch_size=",
        "warn",
    ):
        assert part in message
    assert not (tmp_path / "run").exists()
    rows = int(message.partition("per_device_train_batch_size=")[2].split(")")[0].split()[0])
    assert 1 <= rows < 8
    assert run(LoRA(r=3), per_device_train_batch_size=max(1, rows - 1), per_device_eval_batch_size=1).steps == 2
    with caplog.at_level(logging.WARNING, logger="spectune"):
        assert run(LoRA(r=3), memory_check="warn").steps == 2
    assert "predicted to take" in caplog.text
    off = run(LoRA(r=3), memory_check="off")
    assert off.predicted_memory_bytes == {}
    assert off.memory_prediction_source is None


def test_a_base_that_cannot_be_described_is_trained_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel for this\nand more")

    monkeypatch.setattr(prediction, "estimate_of", fails)
    result = run(LoRA(r=5))
    assert result.memory_prediction_source == "none"
    assert result.predicted_memory_bytes == {}
    assert "not predicted: RuntimeError: no kernel for this" in caplog.text


def test_recordings_are_planned_unless_something_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured on a CUDA device is refused here: how the plan is asked shows it."""
    asked: list[tuple[Any, Any]] = []
    real = prediction.estimate_of

    def watched(workload: Any, shape: Any, validation: Any, execution: Execution) -> Any:
        asked.append((execution.recomputation, execution.graphs))
        return real(workload, shape, validation, replace(execution, graphs=False))

    monkeypatch.setattr(prediction, "estimate_of", watched)
    monkeypatch.setattr(prediction, "free_memory", lambda device: 1)
    model, tokenizer, rows, config = make_model(), make_tokenizer(), make_rows(24), TrainingConfig()
    delta = attach(model, LoRA(r=3), tokenizer=tokenizer)
    prepared = prepare(model, tokenizer, delta.method, rows, rows[:4], config, delta.base_fingerprint)
    with_graphs = replace(decide_run(delta, prepared), graphs=True)
    monkeypatch.setattr(prediction, "decide_run", lambda *_: with_graphs)
    found = prediction.predict(delta, prepared, World())
    assert asked == [(False, True), ("selective", False), (True, False)]
    assert found.execution.recomputation is True
    assert found.execution.graphs is False
    assert found.execution.reason("gradient_checkpointing") is not None


def test_the_check_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    run(output_dir=tmp_path / "run")
    assert run(output_dir=tmp_path / "run", resume=True, memory_check="off").steps == 2


def test_the_plan_leaves_a_run_s_numbers_alone() -> None:
    with_plan, without = run(), run(memory_check="off")
    assert with_plan.train_loss == without.train_loss
    assert with_plan.valid_loss == without.valid_loss


def test_recomputation_leaves_no_hook_that_would_keep_more_of_later_runs() -> None:
    model = make_model()
    attach(model, LoRA(r=2))
    embedding = model.get_input_embeddings()
    with recomputing(model, True):
        assert not embedding._forward_hooks
        loss = model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
        loss.backward()
    assert not embedding._forward_hooks


@pytest.mark.parametrize(
    ("compiled", "mode", "margin"),
    [(False, True, 1.03), (True, False, 1.03), (True, "selective", 1.06), (True, True, 1.06), (True, "offload", 1.06)],
)
def test_compiled_blocks_that_recompute_are_given_twice_the_margin(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, mode: Any, margin: float
) -> None:
    delta = attach(make_model(), LoRA(r=3), tokenizer=make_tokenizer())
    found = plan(delta.model, delta.method, 2, 16, device="cpu")
    found = replace(
        found, torch_compile=compiled, gradient_checkpointing=mode, peak_allocated=10**8, peak_reserved=10**8
    )
    held = sum(p.numel() * p.element_size() for p in {*delta.model.parameters(), *delta.parameters()})
    free = [round(margin * 10**8) - held]
    monkeypatch.setattr(prediction, "free_memory", lambda device: free[0])
    execution = Execution(compiled, recomputation=mode)
    prediction.check_memory(prediction.Prediction(execution, found), delta, "refuse")
    free[0] -= 1
    with pytest.raises(DoesNotFitError):
        prediction.check_memory(prediction.Prediction(execution, found), delta, "refuse")
