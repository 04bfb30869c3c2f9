"""Blocks recorded as CUDA graphs give what the blocks give: losses and gradients of every method."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from spectune.blocks.compile import compiled
from spectune.blocks.cuda_graphs import graphed
from spectune.deltas import Method
from spectune.methods import METHODS, BottleneckAdapter, FullFineTuning, LoRA, PrefixTuning
from spectune.objectives import CAUSAL_LM
from tests.training.test_compiling import built, gpt2, llama, undropped

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:TensorFloat32")]
PASSES = 8


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batches(masked: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(PASSES):
        ids = torch.randint(0, 60, (4, 16 if number % 3 else 24), generator=generator).cuda()
        batch = {"input_ids": ids, "labels": ids}
        if masked:
            mask = torch.ones_like(ids)
            mask[1, : 3 + number] = 0
            batch |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        found.append(batch)
    return found


def passes(
    make: Any, method: Method, *, dtype: torch.dtype, compiling: bool, record: bool, masked: bool, every: int
) -> Any:
    model, delta = built(make, method)
    model.cuda().to(dtype)
    losses, gradients = [], []
    with contextlib.ExitStack() as stack:
        if compiling:
            stack.enter_context(compiled(model, delta.family))
        if record:
            stack.enter_context(graphed(model, delta.family, list(delta.parameters())))
        for number, batch in enumerate(batches(masked) * 2, start=1):
            loss, _ = CAUSAL_LM.loss_sum(model, batch)
            loss.backward()
            losses.append(loss.item())
            if number % every == 0:
                gradients.append([p.grad.double().clone() for p in delta.parameters() if p.grad is not None])
                for p in delta.parameters():
                    p.grad = None
    return losses, gradients


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged, but for what a method has to say of the base."""
    found = [record.getMessage() for record in caplog.records if record.name == "spectune"]
    of_the_base = ("does not divide some inputs", "has no biases: BitFit trains")
    return [message for message in found if not any(part in message for part in of_the_base)]


def check(make: Any, method: Method, caplog: pytest.LogCaptureFixture, **how: Any) -> None:
    settings = {"dtype": torch.float32, "compiling": False, "masked": False, "every": 1, **how}
    expected = passes(make, method, record=False, **settings)
    with caplog.at_level(logging.WARNING, logger="spectune"):
        found = passes(make, method, record=True, **settings)
    assert not said(caplog), "something was not recorded"
    room = 1e-4 if settings["dtype"] == torch.float32 else 3e-2
    assert found[0] == pytest.approx(expected[0], rel=room)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert len(ours) == len(theirs) > 0
        ours_flat, theirs_flat = (torch.cat([g.flatten() for g in part]) for part in (ours, theirs))
        assert float((ours_flat - theirs_flat).norm() / theirs_flat.norm()) <= room


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(make: Any, method: type[Method], caplog: pytest.LogCaptureFixture) -> None:
    check(make, undropped(method), caplog)
    check(make, undropped(method), caplog, masked=True)


@pytest.mark.parametrize("method", [LoRA(), PrefixTuning(), FullFineTuning()], ids=lambda m: m.name)
def test_compiled_blocks(method: Method, caplog: pytest.LogCaptureFixture) -> None:
    check(gpt2, method, caplog, compiling=True)
    check(llama, method, caplog, compiling=True, dtype=torch.bfloat16)


def test_batches_of_a_step_add_up(caplog: pytest.LogCaptureFixture) -> None:
    check(llama, LoRA(r=4), caplog, every=4)
    check(gpt2, FullFineTuning(), caplog, every=8)


def test_dropout_draws_anew_in_every_replay(caplog: pytest.LogCaptureFixture) -> None:
    """Losses of one batch again and again differ by what was dropped, and only by that."""
    model, delta = built(llama, BottleneckAdapter(dropout=0.5, bottleneck_dim=8))
    model.cuda()
    batch = batches(masked=False)[1]
    with graphed(model, delta.family, list(delta.parameters())):
        losses = []
        for _ in range(PASSES):
            loss, _ = CAUSAL_LM.loss_sum(model, batch)
            loss.backward()
            losses.append(loss.item())
    assert not said(caplog)
    assert len(set(losses)) == PASSES
