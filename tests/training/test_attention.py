"""Where a run takes cuDNN's attention: in steps that repay its plans, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import LlamaConfig

from spectune.compute.cudnn import cudnn_allowed, cudnn_attention
from spectune.compute.evaluating import evaluating
from spectune.families import family_from_config
from spectune.methods import LoRA
from spectune.planning.kernels import kernel_for
from spectune.training import TrainingConfig, decisions, train
from spectune.training.decisions import takes_cudnn
from spectune.training.loop import Loop
from tests.support import make_model, make_rows, make_tokenizer

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
)


@pytest.mark.parametrize(
    ("lengths", "steps", "packs", "taken"),
    [
        ([2048] * 8, 5, False, True),  # one shape
        (list(range(1000, 2000)), 10_000, False, True),
        (list(range(1000, 2000)), 100, False, False),  # each batch is new
        ([1000, 2000] * 8, 100, False, True),  # two shapes
        (list(range(20, 120)), 100_000, False, False),  # flash attention is as fast
        (list(range(1000, 2000)), 10_000, True, False),
        ([2048] * 8, 5, True, False),  # its masks, or a kernel of its own
    ],
)
def test_plans_have_to_be_repaid(lengths: list[int], steps: int, packs: bool, taken: bool) -> None:
    config = TrainingConfig(per_device_train_batch_size=4)
    assert takes_cudnn(family_from_config(LLAMA_8B), lengths, steps, config, packs=packs) is taken


def test_it_is_put_back_and_what_the_user_chose_stays() -> None:
    before = cudnn_allowed()
    with cudnn_attention(False):
        assert not cudnn_allowed()
    assert cudnn_allowed() == before
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with cudnn_attention(True):
            assert not cudnn_allowed()
        assert not cudnn_allowed()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    with evaluating(nn.Dropout(0.5)) as _:
        assert not cudnn_allowed()
    assert cudnn_allowed() == before


@pytest.mark.parametrize("taken", [True, False])
def test_steps_take_what_was_decided_and_validation_never_does(taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model(), set()
    # what is asked of a model before its first step has other shapes
    begins: list[Any] = []
    begin = Loop.begin
    monkeypatch.setattr(Loop, "begin", lambda *args: (begins.append(args), begin(*args))[1])

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if begins:
            seen.add((module.training, cudnn_allowed()))

    model.register_forward_pre_hook(look, with_kwargs=True)
    monkeypatch.setattr(decisions, "has_cudnn", lambda _: True)
    monkeypatch.setattr(decisions, "takes_cudnn", lambda *_, **__: taken)
    train(model, make_tokenizer(), LoRA(), make_rows(), make_rows(6),
          TrainingConfig(max_steps=2, packing=False),
          console=Console(quiet=True))  # fmt: skip
    assert {allowed for training, allowed in seen if training} == {taken}
    assert {allowed for training, allowed in seen if not training} == {False}
    assert cudnn_allowed()


def test_the_plan_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectune.planning.kernels.cudnn_head_limit", lambda: 256)
    query = torch.empty(2, 8, 16, 64, dtype=torch.bfloat16, device="meta")
    masked = torch.ones(2, 1, 16, 16, dtype=torch.bool, device="meta")
    few = torch.empty(2, 2, 16, 64, dtype=torch.bfloat16, device="meta")
    assert kernel_for("cuda", query, few, few, None) == "cudnn"
    with cudnn_attention(False):
        assert kernel_for("cuda", query, few, few, None) == "flash"
        assert kernel_for("cuda", query, query, query, masked) == "efficient"
        # transformers repeats keys and values where there is a mask; who does not gets no kernel
        assert kernel_for("cuda", query, few, few, masked) == "math"
