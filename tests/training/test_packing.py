"""Packing in the loop: the same steps, rows, tokens and deltas; when it is on, what is said, and what is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, LlamaConfig

from spectune.blocks.execution import Packing
from spectune.compute.varlen import loop_by_document
from spectune.data import Example, Row, by_length
from spectune.deltas import Method, attached
from spectune.errors import ConfigError, InterruptedRun
from spectune.families import family_from_config
from spectune.methods import BitFit, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from spectune.training import RunResult, TrainingConfig, decisions, train
from spectune.training import loop as loop_module
from spectune.training.decisions import share_saved
from spectune.training.distribution import World
from spectune.training.step_batches import Batches
from tests.support import make_model, make_rows, make_tokenizer

METHODS: list[Method] = [
    LoRA(r=2),
    BitFit(),
    FullFineTuning(),
    PrefixTuning(num_virtual_tokens=4),
    PromptTuning(num_virtual_tokens=4),
]


def settings(**changes: Any) -> TrainingConfig:
    given = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, **changes}
    return TrainingConfig(**given)


def unlike_rows(count: int = 24) -> list[dict[str, str]]:
    """Every third row is three times as long."""
    rows = make_rows(count)
    return [{**row, "completion": row["completion"] * 3} if n % 3 == 0 else row for n, row in enumerate(rows)]


def run(
    method: Method, config: TrainingConfig, rows: Any = None, **model: Any
) -> tuple[RunResult, dict[str, torch.Tensor], str]:
    base = make_model(**model)
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=200, file=nowhere)
        given = unlike_rows() if rows is None else rows
        result = train(base, make_tokenizer(), method, given, make_rows(6), config, console=console)
    delta = attached(base)["default"]
    return result, {name: t.clone() for name, t in delta.training_state_dict().items()}, console.export_text()


#: every method with its batches accumulated; by itself each batch is one of those
@pytest.mark.parametrize(
    ("method", "accumulate"),
    [(m, 3) for m in METHODS] + [(METHODS[0], 1)] + [pytest.param(m, 1, marks=pytest.mark.slow) for m in METHODS[1:]],
    ids=repr,
)
def test_a_packed_run_is_the_padded_one(method: Method, accumulate: int) -> None:
    config = settings(max_steps=3, gradient_accumulation_steps=accumulate, learning_rate=1e-3)
    padded, a, _ = run(method, config.model_copy(update={"packing": False}))
    packed, b, text = run(method, config.model_copy(update={"packing": True}))
    assert "rows are packed" in text
    assert packed.train_tokens == padded.train_tokens
    assert packed.target_tokens == padded.target_tokens
    assert packed.train_loss == pytest.approx(padded.train_loss, rel=1e-5)
    assert packed.valid_loss == pytest.approx(padded.valid_loss, rel=1e-4)
    # Adam divides by the gradient's size: where that is rounding alone, so is the step
    apart = [((b[name] - tensor).abs() > 2e-5).float().mean().item() for name, tensor in a.items()]
    assert max(apart) < 0.02


def test_a_step_has_the_rows_that_it_has_without(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[bool, list[list[int]]] = {True: [], False: []}
    of_step = Batches.of_step

    def watched(self: Batches, window: Any) -> Any:
        found = of_step(self, window)
        rows = sorted(row for batch in found for pack in batch for row in pack)
        assert rows == sorted(row for batch in window for row in batch)
        seen[self.packing.on].append(rows)
        return found

    monkeypatch.setattr(Batches, "of_step", watched)
    for packing in (True, False):
        config = settings(gradient_accumulation_steps=2, packing=packing, memory_check="off")
        run(LoRA(r=2), config)
    assert seen[True] == seen[False]
    assert len(seen[True]) == 6


def test_processes_share_a_step_s_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [60, 12, 31, 7, 22, 18, 9, 40, 5, 11]
    examples = [Example(list(range(length)), 0, Row("", "")) for length in lengths]
    window = by_length(range(10), lengths, 4)
    config = settings(per_device_train_batch_size=2)
    for kernel in (None, loop_by_document):
        found = []
        for rank in range(2):
            world = World()
            world.size, world.rank = 2, rank
            found.append(Batches(examples, config, Packing(True, kernel), world).of_step(window))
        assert len(found[0]) == len(found[1])
        assert sorted(row for own in found for batch in own for pack in batch for row in pack) == list(range(10))


#: that a run goes on bit for bit is tested unpacked; here it is packs that do, with weights beside the base's
#: and with the base's own
@pytest.mark.parametrize(
    "method",
    [m if m.name in ("lora", "full") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
    ids=repr,
)
def test_stop_and_resume_equals_one_run_bit_for_bit(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(gradient_accumulation_steps=2, packing=True)
    _, whole, _ = run(method, config.model_copy(update={"output_dir": tmp_path / "whole"}))
    finish = loop_module.Loop.finish

    def interrupted(self: Any) -> float:
        loss = finish(self)
        if self.run.progress.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    parts = config.model_copy(update={"output_dir": tmp_path / "parts"})
    monkeypatch.setattr(loop_module.Loop, "finish", interrupted)
    with pytest.raises(InterruptedRun, match="--resume"):
        run(method, parts)
    monkeypatch.undo()
    result, resumed, text = run(method, parts.model_copy(update={"resume": True}))
    assert "rows are packed" in text
    assert result.steps == 6
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
    with pytest.raises(ConfigError, match=r"packing: True in the finished run, False now"):
        run(method, parts.model_copy(update={"resume": True, "packing": False}))


def test_auto_packs_where_it_saves_a_tenth() -> None:
    config = settings(max_steps=1)
    assert share_saved([20] * 16, config) == 0
    assert share_saved([20, 19] * 8, config) < decisions.WORTH
    assert share_saved([60, 20, 19, 18] * 4, config) > decisions.WORTH
    # the seeds of a comparison do alike
    assert len({share_saved([60, 20, 19, 18] * 4, settings(seed=seed)) for seed in range(5)}) == 1
    # one row in a step leaves nothing to share
    assert share_saved([60, 20, 19, 18] * 4, settings(per_device_train_batch_size=1)) == 0
    alike = [{"prompt": "name: Ada\n", "completion": "Ada lives in Leeds."}] * 12
    assert "packed" not in run(LoRA(r=2), config, alike)[2]
    assert "rows are packed (attention document by document)" in run(LoRA(r=2), config)[2]
    assert "rows are packed (masks)" in run(LoRA(r=2), config, dropout=0.1)[2]
    assert "packed" not in run(LoRA(r=2), settings(max_steps=1, packing=False))[2]


def test_auto_pads_on_a_gpu_that_waits_to_be_asked_for_kernels() -> None:
    lengths, config = [120, 40, 38, 36] * 8, settings(max_steps=1, per_device_train_batch_size=16)
    small = family_from_config(GPT2Config())
    large = family_from_config(LlamaConfig(num_key_value_heads=8))
    assert decisions.wants_packs(small, lengths, config, "cpu")
    assert not decisions.wants_packs(small, lengths, config, "cuda")
    assert decisions.wants_packs(large, lengths, config, "cuda")
    assert not decisions.wants_packs(large, [40] * 32, config, "cuda")
    always = settings(max_steps=1, packing=True)
    assert decisions.wants_packs(small, lengths, always, "cuda")


def test_a_base_that_cannot_keep_documents_apart_is_padded_and_it_is_said() -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "eos_token_id": 0}

    def go(packing: Any) -> str:
        torch.manual_seed(0)
        with open(os.devnull, "w") as nowhere:
            console = Console(record=True, width=400, file=nowhere)
            model = BloomForCausalLM(BloomConfig(**sizes, bos_token_id=0))
            config = settings(max_steps=2, packing=packing, max_length=60)
            train(model, make_tokenizer(), LoRA(r=2), unlike_rows(), make_rows(6), config, console=console)
        return console.export_text()

    text = go("auto")
    assert "note: rows are padded, not packed" in text
    why = "BloomForCausalLM does not use transformers' attention interface"
    assert f"more tokens than need be: ConfigError: {why}" in text
    with pytest.raises(ConfigError, match=rf"packing is refused: .*{why}"):
        go(True)


def test_a_kernel_that_fails_leaves_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image for this device")

    monkeypatch.setattr(decisions, "kernels", lambda *_, **__: [broken, None])
    result, _, text = run(LoRA(r=2), settings(max_steps=2, packing=True))
    assert "rows are packed (masks)" in text
    assert result.steps == 2


def test_gradient_checkpointing_goes_with_packs() -> None:
    plain, recomputed = (
        run(PromptTuning(num_virtual_tokens=3), settings(max_steps=3, packing=True, gradient_checkpointing=on))[0]
        for on in (False, True)
    )
    assert recomputed.train_loss == pytest.approx(plain.train_loss, rel=1e-5)
