"""Rows of a delta each, on a GPU: what they give alone, in forward and backward, compiled and captured."""

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
from spectune.blocks.recompute import recomputing
from spectune.compute.varlen import flash_by_document
from spectune.data import collate, collate_packs
from spectune.deltas import Delta, attach, packed, packing, route
from spectune.methods import IA3, OFT, BitFit, BottleneckAdapter, DoRA, LNTuning, LoRA, MiSS, PrefixTuning, PromptTuning
from spectune.objectives import CAUSAL_LM
from tests.contract.conftest import move
from tests.contract.families import gpt2, llama
from tests.contract.test_packed import examples

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:TensorFloat32")]
METHODS = {
    "lora": LoRA(r=4), "wide": LoRA(r=8), "dora": DoRA(r=4), "adapter": BottleneckAdapter(dropout=0.0), "ia3": IA3(),
    "bitfit": BitFit(), "ln": LNTuning(), "miss": MiSS(r=4), "oft": OFT(oft_block_size=8),
    "prefix": PrefixTuning(num_virtual_tokens=3), "long": PrefixTuning(num_virtual_tokens=5),
    "prompt": PromptTuning(num_virtual_tokens=2),
}  # fmt: skip
#: without virtual tokens in the sequence, as captured blocks have one shape
SHAPED = [name for name in METHODS if name != "prompt"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def several(make: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Delta]]:
    torch.manual_seed(2)
    model = make(2).eval()
    deltas = {name: attach(model, method, name, seed=n) for n, (name, method) in enumerate(METHODS.items())}
    for delta in deltas.values():
        move(delta)
    return model.cuda().to(dtype), deltas


def gradients(deltas: dict[str, Delta]) -> dict[str, Tensor]:
    return {
        name: torch.cat([p.grad.flatten() for p in delta.parameters() if p.grad is not None]).double()
        for name, delta in deltas.items()
        if any(p.grad is not None for p in delta.parameters())
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], room: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) <= room, name


def alone(
    model: Any, deltas: dict[str, Delta], names: list[str | None], ids: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of each row by itself."""
    logits = []
    for row, name in enumerate(names):
        with route(model, name):
            logits.append(model(input_ids=ids[row : row + 1], use_cache=False).logits[0])
    torch.stack(logits).float().square().mean().backward()
    found = gradients(deltas)
    model.zero_grad()
    return torch.stack(logits).detach(), found


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(("dtype", "room"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("recomputed", [False, True])
def test_rows_equal_their_solo_runs(make: Any, dtype: torch.dtype, room: float, recomputed: bool) -> None:
    model, deltas = several(make, dtype)
    names: list[str | None] = [*METHODS, None, "lora", "wide", "prompt"]
    ids = torch.randint(1, 90, (len(names), 12), generator=torch.Generator().manual_seed(3)).cuda()
    expected, wanted = alone(model, deltas, names, ids)
    model.train(recomputed)
    with recomputing(model, recomputed), route(model, names):
        logits = model(input_ids=ids, use_cache=False).logits
    logits.float().square().mean().backward()
    assert float((logits.detach() - expected).float().norm() / expected.float().norm()) <= room
    same(gradients(deltas), wanted, room)


@pytest.mark.parametrize("compiling", [False, True])
def test_captured_blocks_serve_the_route_that_they_were_captured_under(
    compiling: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, deltas = several(llama)
    routes: list[list[str | None]] = [[*SHAPED, None], [None, *reversed(SHAPED)]]
    ids = torch.randint(1, 90, (len(routes[0]), 12), generator=torch.Generator().manual_seed(3)).cuda()
    wanted = [alone(model, deltas, names, ids)[1] for names in routes]
    model.train()
    trained = [p for delta in deltas.values() for p in delta.parameters()]
    family = deltas["lora"].family
    with contextlib.ExitStack() as stack:
        if compiling:
            stack.enter_context(compiled(model, family))
        stack.enter_context(caplog.at_level(logging.WARNING, logger="spectune"))
        stack.enter_context(graphed(model, family, trained))
        for number in range(12):
            with route(model, routes[number % 2]):
                logits = model(input_ids=ids, use_cache=False).logits
            logits.float().square().mean().backward()
            same(gradients(deltas), wanted[number % 2], 1e-4)
            model.zero_grad()
    assert not [r for r in caplog.records if "without CUDA graphs" in r.getMessage()]


def test_packs_of_a_delta_each_go_through_the_kernel() -> None:
    model, deltas = several(llama, torch.bfloat16)
    names: list[str | None] = ["prefix", "lora", "long", None, "prompt"]
    rows, packs = examples(), [[2, 3], [5, 1], [0, 4, 6], [6], [1, 3]]
    for name, pack in zip(names, packs, strict=True):
        with route(model, name):
            batch = {key: value.cuda() for key, value in collate([rows[i] for i in pack], 0).items()}
            loss, _ = CAUSAL_LM.loss_sum(model, batch)
        if loss.requires_grad:
            loss.backward()
    wanted = gradients(deltas)
    model.zero_grad()
    batch = {key: value.cuda() for key, value in collate_packs([[rows[i] for i in p] for p in packs], 0).items()}
    with packing(model, flash_by_document), packed(model, batch.pop("documents")), route(model, names):
        loss, _ = CAUSAL_LM.loss_sum(model, batch)
    loss.backward()
    same(gradients(deltas), wanted, 5e-2)
