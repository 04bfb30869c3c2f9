"""What a run says of its own speed, memory and last loss."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from spectune.compute.memory import PeakMemory
from spectune.methods import FullFineTuning, LoRA
from spectune.objectives import CAUSAL_LM
from spectune.objectives.causal_lm import CausalLM
from spectune.training import RunResult, TrainingConfig, peaks, run_folder, step_batches, train, validating
from spectune.training import loop as loop_module
from spectune.training.machine import Gauges
from tests.support import make_model, make_rows, make_tokenizer

QUIET = Console(quiet=True)


def run(method: Any, **changes: Any) -> RunResult:
    given = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, **changes}
    return train(
        make_model(), make_tokenizer(), method, make_rows(), make_rows(6), TrainingConfig(**given), console=QUIET
    )


def test_speed_is_without_data_validation_checkpoints_and_the_first_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only moves where something is done: 1 s for a loss with its gradient, 1000 s for all else."""
    now = [0.0]

    def taking(owner: Any, name: str, seconds: float) -> None:
        real = getattr(owner, name)

        def slow(*given: Any, **options: Any) -> Any:
            now[0] += seconds
            return real(*given, **options)

        monkeypatch.setattr(owner, name, slow)

    # half of the time the thread that works waits for the CPU, which others have
    gauges = Gauges(lambda: now[0], lambda: now[0] / 2, lambda: None, None)
    monkeypatch.setattr(loop_module, "Gauges", SimpleNamespace(of=lambda device_type: gauges))
    taking(step_batches, "collate", 1000)
    taking(validating, "row_losses", 1000)
    taking(run_folder, "save_checkpoint", 1000)
    taking(run_folder, "swap_best", 1000)
    taking(CAUSAL_LM, "loss_sum", 1)
    counted: list[int] = []
    real = loop_module.Loop.begin

    def begin(self: Any, window: Any) -> None:
        counted.append(sum(len(self.batches.examples[i].input_ids) for batch in window for i in batch))
        real(self, window)

    monkeypatch.setattr(loop_module.Loop, "begin", begin)
    given = {"eval_steps": 1, "save_steps": 2, "gradient_accumulation_steps": 2, "packing": False}
    result = run(LoRA(r=2), output_dir=tmp_path / "run", **given)
    assert now[0] > 10_000
    timed = counted[loop_module.MEMORY_STEPS :]
    assert result.train_tokens_per_second == pytest.approx(sum(timed) / (2 * len(timed)))
    assert result.train_seconds == 12
    assert result.machine_load["train"].ran_share == pytest.approx(0.5)
    assert result.machine_load["train"].busy


def test_a_run_of_the_measured_steps_alone_has_a_speed() -> None:
    assert run(LoRA(r=2), max_steps=1).train_tokens_per_second > 0


def test_peaks_of_training_and_validation() -> None:
    """Training holds gradients, moments and what backward needs; validation neither the latter nor gradients."""
    result = run(FullFineTuning())
    peaks = result.peak_memory_bytes
    assert {"train_allocated", "valid_allocated"} <= set(peaks)
    assert any(key.startswith("train_resident") for key in peaks)
    assert any(key.startswith("valid_resident") for key in peaks)
    weights = sum(p.nbytes for p in make_model().parameters())
    assert peaks["train_allocated"] > 4 * weights
    assert 3 * weights < peaks["valid_allocated"] < peaks["train_allocated"] - weights


def test_validation_is_measured_on_its_longest_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    real = validating.row_losses

    def losses(model: Any, examples: Any, *given: Any) -> Any:
        seen.append([len(example.input_ids) for example in examples])
        return real(model, examples, *given)

    monkeypatch.setattr(validating, "row_losses", losses)
    result = run(LoRA(r=2), eval_steps=3, per_device_eval_batch_size=2)
    every = seen[0]  # of the bare base
    assert seen == [every, sorted(every, reverse=True)[:2], every, every]
    assert result.peak_memory_bytes["valid_allocated"] > 0


def test_the_last_validation_loss_shows_what_the_best_hides(tmp_path: Path) -> None:
    config = TrainingConfig(max_steps=16, eval_steps=2, learning_rate=3e-2, output_dir=tmp_path / "run")
    # unlike the training rows: what is learned of those is forgotten of these
    other = [{"prompt": "What is", "completion": " an atom ? description"}]
    result = train(make_model(), make_tokenizer(), FullFineTuning(), make_rows(), other, config, console=QUIET)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validated = [line["valid_loss"] for line in lines if "valid_loss" in line]
    assert len(validated) == 8
    assert result.last_valid_loss == validated[-1]
    assert result.valid_loss == min(validated)
    assert result.valid_loss < result.last_valid_loss
    assert RunResult.load(tmp_path / "run" / "result.json").last_valid_loss == result.last_valid_loss


def test_the_same_weights_with_and_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for steps in (2, 0):
        monkeypatch.setattr(loop_module, "MEMORY_STEPS", steps)
        model = make_model(dropout=0.1)
        config = TrainingConfig(per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2, eval_steps=1)
        train(model, make_tokenizer(), FullFineTuning(), make_rows(), make_rows(6), config, console=QUIET)
        models.append(model.state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_on_cuda_all_steps_are_measured_and_validation_is_not_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA's allocator played by a fake: a peak since the last reset, which training and validation write to."""
    peak = [0]
    events: list[str] = []

    class Fake:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.result: dict[str, int] = {}

        def __enter__(self) -> Fake:
            events.append("begin")
            peak[0] = 0
            return self

        def __exit__(self, *_: object) -> None:
            events.append("end")
            self.result = {"allocated": peak[0]}

    def using(owner: Any, name: str, size: int) -> None:
        real = getattr(owner, name)

        def grown(*given: Any, **options: Any) -> Any:
            peak[0] = max(peak[0], size + len([e for e in events if e == name]))
            events.append(name)
            return real(*given, **options)

        monkeypatch.setattr(owner, name, grown)

    objective = CausalLM()
    monkeypatch.setattr(loop_module, "objective_of", lambda _: objective)
    using(objective, "loss_sum", 100)
    using(validating, "row_losses", 500)
    monkeypatch.setattr(peaks, "PeakMemory", Fake)
    monkeypatch.setattr(peaks, "counts_tensors", lambda device_type: False)
    result = run(LoRA(r=2), max_steps=4, eval_steps=2)
    step, valid = "loss_sum", "row_losses"
    assert events == [
        *(valid, "begin", step, step, "end", "begin", valid, "end", valid, "begin", step, step, "end", valid, "begin")
    ]
    assert result.peak_memory_bytes == {"train_allocated": 103, "valid_allocated": 501}


def test_measuring_goes_on_behind_what_was_set_aside_and_failed() -> None:
    """A capture of CUDA graphs that fails leaves the run going, and so its peaks."""
    events: list[str] = []

    class Watched(peaks.Peaks):
        def resume(self) -> None:
            events.append("resume")
            self._stretch = PeakMemory("cpu", count_tensors=False)

        def pause(self) -> None:
            events.append("pause")
            self._stretch = None

    measured = Watched(torch.device("cpu"), list, {})
    measured.resume()
    with pytest.raises(RuntimeError, match="not permitted"), measured.set_aside():
        raise RuntimeError("operation not permitted when stream is capturing")
    assert events == ["resume", "pause", "resume"]
