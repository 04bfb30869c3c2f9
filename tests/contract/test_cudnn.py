"""No call of attention with a mask, with dropout, over more keys than queries, or outside of a training step, while
torch may take cuDNN's attention: in whatever of ours runs a model. (docs/results/kernels.md has what it gives there.)

torch has the switch on every machine, so it is seen here, without the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from spectune.comparing import measure as measured_module
from spectune.compute.cudnn import cudnn_allowed, cudnn_attention, why_not
from spectune.data import load_rows
from spectune.deltas import Method, attach, merge_and_measure, why_mask_is_needed, why_not_cudnn, why_not_packed
from spectune.evaluation import Task, judge, passage_kls, sample_passages
from spectune.inference import Sampling, decode_tokens_per_second, generate_texts
from spectune.methods import LoRA, PrefixTuning, PromptTuning
from spectune.training import TrainingConfig, decisions, train
from tests.contract.families import FAMILIES
from tests.support import make_model, make_rows, make_tokenizer


@dataclass
class Seen:
    """Calls of attention: in a training step or not, cuDNN allowed or not, and why it should not be."""

    calls: list[tuple[bool, bool, str | None]]

    @property
    def allowed(self) -> int:
        return sum(allowed for _, allowed, _ in self.calls)

    def masked(self) -> int:
        return sum(reason == "attention has a mask" for *_, reason in self.calls)

    def check(self) -> None:
        assert self.calls
        assert not [reason for _, allowed, reason in self.calls if allowed and reason]
        assert not [1 for trains, allowed, _ in self.calls if allowed and not trains]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    found = Seen([])
    attend = F.scaled_dot_product_attention

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        trains = torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1
        found.calls.append((trains, cudnn_allowed(), why_not(*args, **kwargs)))
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    # of every run that may: the numbers decide elsewhere
    monkeypatch.setattr(decisions, "has_cudnn", lambda _: True)
    monkeypatch.setattr(decisions, "takes_cudnn", lambda *_, packs, **__: not packs)
    assert cudnn_allowed()
    yield found
    assert cudnn_allowed(), "as it was"


ALIKE = [{"prompt": "name: Ada\n", "completion": "Ada lives in Leeds."}] * 8
METHODS: list[Method] = [LoRA(r=2), PromptTuning(num_virtual_tokens=4), PrefixTuning(num_virtual_tokens=4)]


def run(model: PreTrainedModel, method: Method, rows: Any = None, **changes: Any) -> None:
    config = TrainingConfig(**{"max_steps": 2, "packing": False, "memory_check": "off", **changes})
    data = make_rows(8) if rows is None else rows
    train(model, make_tokenizer(), method, data, make_rows(4), config, console=Console(quiet=True))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_training_on_rows_that_need_no_mask_takes_it_and_validation_does_not(method: Method, seen: Seen) -> None:
    run(make_model(), method)
    seen.check()
    assert seen.allowed >= 4
    run(make_model(), method, ALIKE, gradient_checkpointing=True)
    seen.check()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_batches_with_a_mask_do_not(method: Method, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "why_mask_is_needed", lambda _: "this test wants one")
    run(make_model(), method, gradient_checkpointing=True)
    seen.check()
    assert seen.masked() > 8


@pytest.mark.parametrize("method", [LoRA(r=2), PrefixTuning(num_virtual_tokens=4)], ids=lambda method: method.name)
def test_packs_do_not(method: Method, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    run(make_model(), method, packing=True)
    seen.check()
    monkeypatch.setattr(decisions, "kernels", lambda *_, **__: [None])
    run(make_model(), method, packing=True)
    seen.check()
    assert not seen.allowed
    assert seen.masked()


def test_masks_that_a_model_makes_and_dropout_are_found(seen: Seen) -> None:
    """Rows without padding: nothing in the batch says so."""
    dropping, sliding = make_model(dropout=0.1), windowed()
    for model in (dropping, sliding):
        attach(model, LoRA(r=2))
    assert "dropout" in str(why_not_cudnn(dropping, 20))
    assert "mask" in str(why_not_cudnn(sliding, 20))
    assert why_not_cudnn(sliding, 5) is None, "within the window"
    seen.calls.clear()
    for model in (make_model(dropout=0.1), windowed()):
        run(model, LoRA(r=2), ALIKE)
    seen.check()
    assert not seen.allowed


def windowed() -> PreTrainedModel:
    model = FAMILIES["gemma3"]()
    model.resize_token_embeddings(300)
    return model


def of_evaluation(model: PreTrainedModel, tmp_path: Path) -> list[Callable[[], Any]]:
    tokenizer, rows = make_tokenizer(), load_rows(make_rows(4))
    delta = attach(model, LoRA(r=2), "task")
    prompts = [[5, 6, 7, 8], [9, 10]]

    def measured() -> None:
        delta.save(tmp_path / "delta")
        measured_module.measure(model, tokenizer, delta, tmp_path / "delta", batches=(1, 2))

    return [
        lambda: why_mask_is_needed(model),
        lambda: why_not_packed(model),
        lambda: judge(model, tokenizer, Task.of(rows, generate_rows=2, max_length=64)),
        lambda: generate_texts(model, tokenizer, prompts, max_new_tokens=3, sampling=Sampling()),
        lambda: decode_tokens_per_second(model, tokenizer, new_tokens=3, repeats=1),
        lambda: passage_kls(model, sample_passages(model, tokenizer, count=2, length=4, seed=0)),
        lambda: merge_and_measure(model, "task"),
        measured,
    ]


def test_what_only_looks_never_does(seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of attach, judging, generation (left padding and steps), forgetting, merging, measuring."""
    monkeypatch.setattr(measured_module, "ROUNDS", 1)
    monkeypatch.setattr(measured_module, "DECODE_TOKENS", 3)
    model = make_model()
    for number, work in enumerate(of_evaluation(model, tmp_path)):
        before = len(seen.calls)
        work()
        assert len(seen.calls) > before, number
    assert not seen.allowed


def test_threads_that_evaluate_side_by_side_put_back_what_was_there() -> None:
    """Whichever ends first: torch has one switch."""
    inside, over, after = threading.Event(), threading.Event(), []

    def other() -> None:
        with cudnn_attention(False):
            inside.set()
            over.wait(10)
            after.append(cudnn_allowed())

    thread = threading.Thread(target=other)
    with cudnn_attention(False):
        thread.start()
        assert inside.wait(10)
    assert not cudnn_allowed(), "the other one is not done"
    over.set()
    thread.join()
    assert after == [False]
    assert cudnn_allowed()
    with cudnn_attention(False), cudnn_attention(True):
        assert not cudnn_allowed(), "off around it stays off"
    assert cudnn_allowed()
