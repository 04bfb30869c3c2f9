"""What measuring a trained delta gives: speeds by batch, their overheads, forgetting by passage, memory by phase."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from spectune.comparing import measure as module
from spectune.deltas import Delta, attach, attached
from spectune.evaluation import KeptLogits
from spectune.methods import BottleneckAdapter, FullFineTuning, LoRA
from spectune.storage import load_delta
from spectune.training import RunResult
from spectune.training.machine import Gauges, Watch
from tests.support import forgetting_kl, make_model, make_tokenizer

PASSAGES = [[5, 6, 7, 8, 9], [3, 4], [11, 12, 13]]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DECODE_TOKENS", 4)
    monkeypatch.setattr(module, "ROUNDS", 3)


def moved(method: Any, folder: Path) -> tuple[Any, Any, Delta]:
    """A base with a delta that is no identity, which lies in `folder`, too."""
    model, tokenizer = make_model(), make_tokenizer()
    delta = attach(model, method, name="a", keep_base=method.trains_base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    delta.save(folder)
    if method.trains_base:
        tokenizer.save_pretrained(folder)
    return model, tokenizer, delta


def test_no_merged_copy_is_there_while_memory_is_measured_or_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its modules hold each other: left to the collector, it was counted as memory of the method measured next."""
    model, tokenizer, delta = moved(LoRA(r=2), tmp_path / "best")
    copies: list[weakref.ref[Any]] = []
    seen: list[int] = []
    own_merged, own_peaks = module._merged, module._peaks

    def merged(*args: Any) -> Any:
        copy = own_merged(*args)
        copies.append(weakref.ref(copy))
        return copy

    def peaks(*args: Any) -> Any:
        seen.append(len(copies))
        return own_peaks(*args)

    monkeypatch.setattr(module, "_merged", merged)
    monkeypatch.setattr(module, "_peaks", peaks)
    gc.disable()
    try:
        module.measure(model, tokenizer, delta, tmp_path / "best", batches=(1,))
    finally:
        gc.enable()
    assert seen == [0]
    assert [copy() for copy in copies] == [None]


@pytest.mark.parametrize("method", [LoRA(r=2), BottleneckAdapter(bottleneck_dim=4), FullFineTuning()])
def test_the_fields_of_a_result(method: Any, tmp_path: Path) -> None:
    model, tokenizer, delta = moved(method, tmp_path / "best")
    expected, kept = forgetting_kl(model, PASSAGES), KeptLogits(10**9)
    found = module.forgetting(model, PASSAGES, kept)
    assert module.forgetting(model, PASSAGES, kept) == found  # what is kept of the base is what it gives
    found |= module.measure(model, tokenizer, delta, tmp_path / "best")
    assert not attached(model)
    assert len(found["forgetting_by_passage"]) == 3
    assert found["forgetting_kl_nats_per_token"] == expected == pytest.approx(sum(found["forgetting_by_passage"]) / 10)
    assert expected > 0
    assert set(found["decode"]) == {"1", "16"}
    for of_batch in found["decode"].values():
        assert of_batch["tuned"] > 0
        assert of_batch["base"] > 0
        assert (of_batch["merged"] is None) == (of_batch["overhead_merged"] is None) == (not method.can_merge)
        low, high = of_batch["overhead_range"]
        assert -1 < low <= of_batch["overhead"] <= high
    assert found["decode_tokens_per_second"] == found["decode"]["1"]["tuned"]
    assert list(found["inference_overhead_range"]) == found["decode"]["1"]["overhead_range"]
    assert found["swap_seconds"] > 0
    peaks = found["peak_memory_bytes"]
    weights = sum(p.nbytes for p in model.parameters())
    assert peaks["load_allocated"] > weights
    assert peaks["generate_allocated"] > weights
    assert {key.partition("_")[0] for key in peaks} == {"load", "generate"}
    if method.trains_base:  # the weights from the folder, and a copy of the base
        assert peaks["load_allocated"] > 2 * weights


def test_a_result_takes_them_in_and_keeps_the_memory_of_training(tmp_path: Path) -> None:
    model, tokenizer, delta = moved(LoRA(r=2), tmp_path / "best")
    found = module.measure(model, tokenizer, delta, tmp_path / "best", batches=(1,))
    given: dict[str, Any] = dict.fromkeys(RunResult.model_fields, 1)
    given |= {"method": "lora", "name": "a", "settings": {}, "peak_memory_bytes": {"train_allocated": 7}, "metrics": {}}
    given["machine_load"] = {}
    result = RunResult.model_construct(**given).with_measured(found)
    assert result.peak_memory_bytes["train_allocated"] == 7
    assert result.peak_memory_bytes["load_allocated"] == found["peak_memory_bytes"]["load_allocated"]
    assert result.decode is not None
    assert json.loads(json.dumps(result.decode)) == result.decode
    assert set(result.decode) == {"1"}


def test_overheads_are_ratios_of_neighbours_and_the_first_rounds_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that becomes twice as slow from round to round: rates halve, overheads stay what they are."""
    model, tokenizer, delta = moved(LoRA(r=2), tmp_path / "best")
    asked: list[tuple[int, int]] = []
    rates = {"tuned": 80.0, "merged": 95.0, "base": 100.0}

    def rate(of: Any, tokenizer: Any, *, batch: int, new_tokens: int, repeats: int, warm_up: int) -> float:
        if new_tokens == 2:
            return 1000.0  # warming up
        asked.append((batch, new_tokens))
        kind = "merged" if of is not model else "tuned" if attached(model) else "base"
        # of every round two for each kind of model
        return float(rates[kind] * batch / 2.0 ** ((len(asked) - 1) // 6))

    monkeypatch.setattr(module, "decode_tokens_per_second", rate)
    monkeypatch.setattr(module, "DECODE_TOKENS", 12)
    monkeypatch.setattr(
        module, "_peaks", lambda model, tokenizer, folder, name, batch: load_delta(model, folder, name) and {}
    )
    found = module.measure(model, tokenizer, delta, tmp_path / "best")
    assert asked == [(1, 12), (16, 6)] * 9
    for batch in (1, 16):
        of_batch = found["decode"][str(batch)]
        assert of_batch["base"] == 100 * batch / 2  # the median of three rounds
        assert of_batch["overhead"] == pytest.approx(0.25)
        assert of_batch["overhead_range"] == pytest.approx([0.25, 0.25])
        assert of_batch["overhead_merged"] == pytest.approx(100 / 95 - 1)
    assert found["decode_tokens_per_second_spread"] == pytest.approx((80 - 20) / 2)


@pytest.mark.parametrize(("pace", "rounds", "tokens"), [(1000.0, 5, 24), (61.0, 4, 6), (1.0, 3, 4)])
def test_a_slow_base_is_timed_for_as_long_as_a_quick_one(
    pace: float, rounds: int, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded tokens wind the clock by what they take at this pace: fewer are decoded, in fewer rounds."""
    model, tokenizer, delta = moved(LoRA(r=2), tmp_path / "best")
    now, asked = [0.0], list[int]()

    def rate(of: Any, tokenizer: Any, *, batch: int, new_tokens: int, **_: Any) -> float:
        now[0] += new_tokens / pace
        asked.append(new_tokens)
        return pace * batch

    monkeypatch.setattr(module, "decode_tokens_per_second", rate)
    for name, value in (("DECODE_TOKENS", 24), ("ROUNDS", 5), ("SECONDS", 1.5)):
        monkeypatch.setattr(module, name, value)
    found = module.measure(model, tokenizer, delta, tmp_path / "best", clock=lambda: now[0])
    assert [new for new in asked if new > 2] == [tokens, max(4, tokens // 2)] * 3 * rounds
    assert found["decode"]["1"]["overhead"] == 0


def test_what_else_the_machine_did_meanwhile_is_told(tmp_path: Path) -> None:
    model, tokenizer, delta = moved(LoRA(r=2), tmp_path / "best")
    seconds = {"wall": iter([10.0, 20.0]), "cpu": iter([1.0, 7.0])}
    gauges = Gauges(lambda: next(seconds["wall"]), lambda: next(seconds["cpu"]), lambda: 5.5, 2)
    found = module.measure(
        model, tokenizer, delta, tmp_path / "best", batches=(1,), watch=Watch(model.device.type, gauges)
    )
    load = found["machine_load"]["decode"]
    assert (load.ran_share, load.load_average, load.cores, load.busy) == (0.6, 5.5, 2, True)


def test_other_batches(tmp_path: Path) -> None:
    model, tokenizer, delta = moved(LoRA(r=2), tmp_path / "best")
    found = module.measure(model, tokenizer, delta, tmp_path / "best", batches=(2,))
    assert set(found["decode"]) == {"2"}
    assert "decode_tokens_per_second" not in found
