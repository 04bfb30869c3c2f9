"""The loop over every method: it learns, resumes bit for bit, weighs tokens, and fails with one clear error."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from spectune.deltas import Method, attach, attached
from spectune.errors import ConfigError, DivergedError, InterruptedRun, OutOfMemoryError
from spectune.methods import METHODS, BottleneckAdapter, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from spectune.objectives import CAUSAL_LM
from spectune.storage import load_delta
from spectune.training import RunResult, TrainingConfig, train
from spectune.training import loop as loop_module
from spectune.training.optimizer import MasterAdamW, learning_rate_at
from tests.support import make_model, make_rows, make_tokenizer
from tests.support.quick import others_slow

QUIET = Console(quiet=True)
PROJECTED = PrefixTuning(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8)
CASES: list[Method] = [
    *(m() for m in METHODS if m not in (PrefixTuning, PromptTuning, BottleneckAdapter)),
    BottleneckAdapter(bottleneck_dim=8),
    PrefixTuning(num_virtual_tokens=4),
    PROJECTED,
    PromptTuning(num_virtual_tokens=4),
]


def settings(**changes: Any) -> TrainingConfig:
    given = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, **changes}
    return TrainingConfig(**given)


def run(method: Method, config: TrainingConfig, **model: Any) -> tuple[RunResult, dict[str, torch.Tensor]]:
    base = make_model(**model)
    result = train(base, make_tokenizer(), method, make_rows(), make_rows(6), config, console=QUIET)
    delta = attached(base)["default"]
    return result, {name: t.clone() for name, t in delta.training_state_dict().items()}


#: of each kind of module one; that every method learns its rows is held by the commands and with heads, too
FEW = ("full", "adapter", "prompt", "lora", "bitfit")


@pytest.mark.parametrize("method", others_slow(CASES, [m for m in CASES if m.name in FEW or m == PROJECTED]), ids=repr)
def test_it_learns_and_writes_what_the_design_says(method: Method, tmp_path: Path) -> None:
    rate = 0.1 if method.virtual_tokens else 1e-2
    result, _ = run(method, settings(output_dir=tmp_path / "run", learning_rate=rate, num_train_epochs=4))
    assert result.valid_loss is not None
    assert result.base_valid_loss is not None
    assert result.valid_loss < result.base_valid_loss
    assert result.steps == 24
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "environment.json", "data_report.json", "metrics.jsonl", "best", "result.json"} <= files
    assert RunResult.load(tmp_path / "run" / "result.json") == result
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["train"]["rows"] == 24
    assert result.peak_memory_bytes["train_allocated"] > 0
    # what lies in best/ answers as the trained delta did
    base = make_model()
    load_delta(base, tmp_path / "run" / "best", "again")
    again = TrainingConfig(per_device_eval_batch_size=16)
    assert valid_loss(base, again) == pytest.approx(result.valid_loss, abs=1e-5)


def valid_loss(model: Any, config: TrainingConfig) -> float:
    from spectune.data import encode, load_rows
    from spectune.evaluation import row_losses

    examples = encode(load_rows(make_rows(6)), make_tokenizer(), max_length=60).examples
    return row_losses(model, examples, 0, config.per_device_eval_batch_size).mean_per_token


#: what a checkpoint holds is a delta's tensors and the run's own, whatever the delta computes: the base's own,
#: modules beside it, keys with and without the weights that only training has; the others are behind `-m slow`
RESUMED = ("full", "adapter", "lora")


@pytest.mark.parametrize(
    "method", others_slow(CASES, [m for m in CASES if m.name in RESUMED or m == PROJECTED]), ids=repr
)
def test_stop_and_resume_equals_one_run_bit_for_bit(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(gradient_accumulation_steps=2, lr_scheduler_type="cosine")
    _, whole = run(method, config.model_copy(update={"output_dir": tmp_path / "whole"}), dropout=0.1)

    finish = loop_module.Loop.finish
    stop_at = 4  # in the middle of the second epoch

    def interrupted(self: Any) -> float:
        loss = finish(self)
        if self.run.progress.step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    parts = config.model_copy(update={"output_dir": tmp_path / "parts"})
    monkeypatch.setattr(loop_module.Loop, "finish", interrupted)
    with pytest.raises(InterruptedRun, match="--resume"):
        run(method, parts, dropout=0.1)
    monkeypatch.undo()
    state = json.loads((tmp_path / "parts" / f"checkpoint-{stop_at}" / "state.json").read_text())
    before = state["progress"]["seconds_by_phase"]
    result, resumed = run(method, parts.model_copy(update={"resume": True}), dropout=0.1)
    assert result.steps == 6
    took = result.seconds_by_phase
    assert before.keys() == took.keys() == {"prove", "rows", "plan", "steps", "validation", "save", "other"}
    assert all(took[phase] > seconds for phase, seconds in before.items())  # what both calls took
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
    lines = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(lines)


def test_resume_on_a_finished_run_says_so_and_with_other_settings_refuses(tmp_path: Path) -> None:
    config = settings(output_dir=tmp_path / "run", max_steps=2)
    first, _ = run(LoRA(r=2), config)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    again = train(
        make_model(),
        make_tokenizer(),
        LoRA(r=2),
        make_rows(),
        make_rows(6),
        config.model_copy(update={"resume": True}),
        console=console,
    )
    assert again == first
    assert "finished already" in console.export_text()
    console.file.close()
    with pytest.raises(ConfigError, match="not empty"):
        run(LoRA(r=2), config)


def test_resume_with_a_changed_setting_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(output_dir=tmp_path / "run", save_steps=1)
    monkeypatch.setattr(loop_module.Loop, "validate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(LoRA(r=2), config)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"weight_decay: 0\.0 in the checkpoint, 0\.5 now"):
        run(LoRA(r=2), config.model_copy(update={"resume": True, "weight_decay": 0.5}))


def test_accumulation_weighs_by_target_tokens() -> None:
    """Two batches of four equal one of eight, though their rows have unlike numbers of targets."""
    one = settings(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    two = settings(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    first, a = run(LoRA(r=2), one.model_copy(update={"max_steps": 3}))
    second, b = run(LoRA(r=2), two.model_copy(update={"max_steps": 3}))
    assert first.target_tokens == second.target_tokens
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=2e-6, rtol=1e-4)


def test_training_loss_is_the_mean_over_target_tokens_of_a_plain_loop() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    config = settings(per_device_train_batch_size=24, num_train_epochs=1, learning_rate=1e-12)
    result = train(model, tokenizer, LoRA(r=2), make_rows(), make_rows(6), config, console=QUIET)
    total, count = 0.0, 0
    base = make_model().double()
    for row in make_rows():
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(row["completion"])["input_ids"] + [0]
        logits = base(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]
        losses = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")[len(prompt) - 1 :]
        total, count = total + losses.sum().item(), count + len(losses)
    assert result.target_tokens == count
    assert result.train_loss == pytest.approx(total / count, abs=1e-5)


def test_a_bfloat16_base_is_tuned_through_float32_masters() -> None:
    """Steps too small for bfloat16 add up; without masters most would round to none."""
    base = make_model(dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    config = settings(learning_rate=2e-5, max_steps=40, warmup_steps=0, lr_scheduler_type="constant")
    train(base, make_tokenizer(), FullFineTuning(), make_rows(), make_rows(6), config, console=QUIET)
    moved = [((p != before[n]).float().mean().item(), p.numel()) for n, p in base.named_parameters() if p.dim() > 1]
    assert sum(share * size for share, size in moved) / sum(size for _, size in moved) > 0.3
    plain = make_model(dtype=torch.bfloat16)
    optimizer = MasterAdamW(list(plain.parameters()), config, 1e-3)
    assert all(master.dtype == torch.float32 for master in optimizer.masters)


def test_a_delta_on_a_bfloat16_base_stays_float32() -> None:
    base = make_model(dtype=torch.bfloat16)
    result = train(base, make_tokenizer(), LoRA(r=2), make_rows(), make_rows(6), settings(), console=QUIET)
    assert result.valid_loss is not None
    assert result.base_valid_loss is not None
    assert result.valid_loss < result.base_valid_loss
    assert all(p.dtype == torch.float32 for p in attached(base)["default"].parameters())


def test_a_loss_that_is_not_finite_is_an_error_and_the_best_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop_module.Loop.backward

    def poisoned(self: Any, examples: Any, targets: int) -> torch.Tensor:
        loss = step(self, examples, targets)
        return loss * float("nan") if self.run.progress.step == 7 else loss

    monkeypatch.setattr(loop_module.Loop, "backward", poisoned)
    with pytest.raises(DivergedError, match=r"step 8 .* of step 6, is kept"):
        run(LoRA(r=2), settings(output_dir=tmp_path / "run"))
    load_delta(make_model(), tmp_path / "run" / "best")


def test_out_of_memory_names_batch_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(CAUSAL_LM, "loss_sum", full)
    with pytest.raises(OutOfMemoryError, match=r"batch of 4 rows of \d+ tokens.*per_device_train_batch_size=2"):
        run(LoRA(r=2), settings(packing=False))
    with pytest.raises(OutOfMemoryError, match=r"batch of \d+ packs of \d+ tokens.*per_device_train_batch_size=2"):
        run(LoRA(r=2), settings(packing=True))


def test_early_stopping_and_the_best_delta_at_the_end() -> None:
    config = settings(learning_rate=0.3, num_train_epochs=30, early_stopping_patience=2, lr_scheduler_type="constant")
    result, _ = run(LoRA(r=2), config)
    assert result.stopped_early
    assert result.best_step is not None
    assert result.best_step < result.steps


def test_prefix_and_prompt_leave_room_in_the_context() -> None:
    with pytest.raises(ConfigError, match="at most 60"):
        run(PromptTuning(num_virtual_tokens=4), settings(max_length=62))


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_learning_rates(kind: Any) -> None:
    config = TrainingConfig(lr_scheduler_type=kind, warmup_steps=0.1)
    rates = [learning_rate_at(step, 100, 1.0, config) for step in range(100)]
    assert rates[0] < rates[5] < rates[9] <= 1.0
    assert rates[10] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1.0) if kind == "constant" else rates[99] < 0.02


def test_a_second_run_with_the_same_seed_is_the_same() -> None:
    (_, a), (_, b) = run(LoRA(r=2), settings(max_steps=4)), run(LoRA(r=2), settings(max_steps=4))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_without_validation_rows_a_seeded_tenth_is_held_out(tmp_path: Path) -> None:
    config = settings(max_steps=2, output_dir=tmp_path / "run")
    train(make_model(), make_tokenizer(), LoRA(r=2), make_rows(), None, config, console=QUIET)
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert (report["train"]["rows"], report["valid"]["rows"]) == (22, 2)


def test_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    run(LoRA(r=2), settings(max_steps=1))
    assert signal.getsignal(signal.SIGINT) is before


def test_an_attached_delta_can_be_trained() -> None:
    model = make_model()
    delta = attach(model, LoRA(r=2), "mine")
    result = train(model, make_tokenizer(), delta, make_rows(), make_rows(6), settings(max_steps=2), console=QUIET)
    assert result.name == "mine"
