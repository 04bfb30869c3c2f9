"""On a CUDA device: a bank's deltas leave its memory and come back to the bit; one recorded step reads any tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import spectune
from spectune.deltas import SlotTables, attach, attached, detach, route
from spectune.methods import BitFit, LNTuning, LoRA
from tests.contract.conftest import move
from tests.contract.families import llama

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:TensorFloat32")]
METHODS = {"lora": LoRA(r=8), "lora-3": LoRA(r=3), "bitfit": BitFit(), "ln": LNTuning()}


def base() -> PreTrainedModel:
    torch.manual_seed(0)
    found: PreTrainedModel = llama().eval().to("cuda")
    return found


def answer(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def test_what_leaves_the_device_frees_its_memory_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    model, ids = base(), torch.randint(1, 90, (2, 6), device="cuda")
    wide = LoRA(r=16)
    for name in ("a", "b"):
        move(attach(model, wide, name), 0.1)
        attached(model)[name].save(tmp_path / name)
        detach(model, name)
    with spectune.Bank(model, tmp_path) as bank, bank.hold(["a"]):
        size = bank.device_bytes
    with spectune.Bank(model, tmp_path, device_memory=size) as bank:
        expected, taken = {}, {}
        for turn in range(2):
            for name in ("a", "b"):
                with bank.route(name):
                    found = answer(model, ids)
                    assert torch.equal(expected.setdefault(name, found), found)
                del found
                torch.cuda.synchronize()
                taken[turn, name] = torch.cuda.memory_allocated()
        assert bank.loads == 2
        assert max(taken.values()) - taken[0, "a"] < size // 2


def test_a_recorded_step_serves_whatever_its_slots_hold() -> None:
    model, ids = base(), torch.randint(1, 90, (4, 5), device="cuda")
    for number, (name, method) in enumerate(METHODS.items()):
        move(attach(model, method, name, seed=number), 0.1)
    tables = SlotTables(model, 4)
    slots = {None: 0, **{name: tables.put(name) for name in METHODS}}
    index = torch.zeros(4, dtype=torch.int64, device="cuda")
    positions = torch.arange(5, device="cuda")[None].expand(4, -1)
    stream = torch.cuda.Stream()

    def step() -> Tensor:
        with torch.no_grad(), tables.routed(None, index, cached=True):
            logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits

    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    for rows in (["lora", None, "bitfit", "ln"], ["lora-3", "lora", "ln", "lora-3"], [None] * 4):
        index.copy_(torch.tensor([slots[row] for row in rows]))
        graph.replay()
        with route(model, rows):
            assert torch.allclose(answer(model, ids), logits, atol=1e-4), rows
    tables.close()
