"""Recorded decoding steps write what the plain ones write, and CUDA's kernels read rows by their lengths."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from spectune.blocks.recorded_steps import PlainSteps, RecordedSteps
from spectune.blocks.step_attention import Filled
from spectune.blocks.step_blocks import Compiling
from spectune.compute.decode_attention import attend_by_length, attend_by_mask, takes_lengths
from spectune.deltas import Attachment, attach
from spectune.families import describe
from spectune.inference.engine import Engine
from spectune.inference.request import Request
from spectune.inference.step_choice import steps_for
from spectune.methods import IA3, BitFit, BottleneckAdapter, DoRA, LoRA, PrefixTuning, PromptTuning
from tests.contract.conftest import move
from tests.contract.families import gemma3, gpt2, llama

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore:Synchronization debug mode"),
]
METHODS = {
    "lora": LoRA(r=4), "wide": LoRA(r=7), "dora": DoRA(r=4), "adapter": BottleneckAdapter(bottleneck_dim=4),
    "bitfit": BitFit(), "ia3": IA3(), "prefix": PrefixTuning(num_virtual_tokens=3),
    "prompt": PromptTuning(num_virtual_tokens=2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def with_deltas(make: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = make().cuda().to(dtype).eval()
    for name, method in METHODS.items():
        move(attach(model, method, name))
    return model


def written(model: Any, steps: Any) -> list[list[int]]:
    """Two mixtures one after the other, rows that enter late and end early."""
    engine = Engine(model, rows=4, steps=steps)
    deltas = [None, *METHODS, "lora", "prefix", None] if Attachment.of(model) else [None] * 6
    tickets = [
        engine.submit(Request([5 + number, 7, 9 + number % 3], 4 + 3 * (number % 4), delta))
        for number, delta in enumerate(deltas)
    ]
    while not engine.idle:
        for one in engine.step():
            assert one.error is None, one.error
    return [ticket.ids for ticket in tickets]


def recording(model: Any, made: list[Any], compiling: Compiling | None = None) -> Any:
    """Steps that are recorded, noted in `made`."""
    found = Attachment.of(model)
    make = steps_for(model, describe(model) if found is None else found.family, 64, compiling=compiling)

    def steps(batch: Any) -> Any:
        made.append(make(batch))
        return made[-1]

    return steps


def check(model: Any, caplog: pytest.LogCaptureFixture, compiling: Compiling | None = None) -> None:
    expected = written(model, lambda batch: PlainSteps(batch.run))
    made: list[Any] = []
    with caplog.at_level(logging.WARNING, logger="spectune"):
        assert written(model, recording(model, made, compiling)) == expected
    assert "cannot be recorded" not in caplog.text
    assert any(isinstance(steps, RecordedSteps) and steps.graphs for steps in made)


@pytest.mark.parametrize("make", [gpt2, llama, gemma3])
@pytest.mark.parametrize("compiling", [None, Compiling()], ids=["as it is", "compiled"])
def test_recorded_steps_write_what_plain_ones_write(
    make: Any, compiling: Compiling | None, caplog: pytest.LogCaptureFixture
) -> None:
    check(make().cuda().eval(), caplog, compiling)
    check(with_deltas(make), caplog, compiling)


@pytest.mark.parametrize("how", [Compiling(tuned=True), Compiling(combined=True), Compiling(unrolled=8)], ids=str)
def test_every_way_to_compile(how: Compiling, caplog: pytest.LogCaptureFixture) -> None:
    check(with_deltas(llama), caplog, how)


@pytest.mark.parametrize("compiling", [None, Compiling()], ids=["as it is", "compiled"])
def test_logits_in_bfloat16(compiling: Compiling | None, caplog: pytest.LogCaptureFixture) -> None:
    """Flash attention reads the cache by lengths there: what it gives was compared with masks before it was used."""
    model, made = with_deltas(llama, torch.bfloat16), []
    with caplog.at_level(logging.WARNING, logger="spectune"):
        assert all(len(ids) >= 4 for ids in written(model, recording(model, made, compiling)))
    assert "cannot be recorded" not in caplog.text


@pytest.mark.parametrize(("heads", "shared"), [(8, 2), (4, 4)])
@pytest.mark.parametrize("capacity", [128, 4096])
def test_flash_reads_each_row_up_to_its_length(heads: int, shared: int, capacity: int) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    lengths = torch.tensor([1, 17, capacity, capacity // 2 + 3], dtype=torch.int32, device="cuda")
    query = torch.randn(4, heads, 1, 64, **settings)
    key, value = (torch.randn(6, capacity + 8, shared, 64, **settings)[:4].transpose(1, 2) for _ in range(2))
    assert takes_lengths(query, key, value)
    mask = (torch.arange(capacity, device="cuda") < lengths[:, None])[:, None, None]
    seen = [t[:, :, :capacity] for t in (key, value)]
    expected = F.scaled_dot_product_attention(
        query.double(), *(t.double() for t in seen), mask, scale=0.2, enable_gqa=True
    ).transpose(1, 2)
    for found in (
        attend_by_length(query, key, value, *Filled.of(lengths.long() - 1, key.shape[2], capacity), scale=0.2),
        attend_by_mask(query, *seen, mask, scale=0.2),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


def test_a_step_of_a_recorded_engine_does_not_wait_for_the_host(caplog: pytest.LogCaptureFixture) -> None:
    """What is replayed copies nothing to the device."""
    model, made = llama().cuda().eval(), list[Any]()
    engine = Engine(model, rows=2, steps=recording(model, made))
    for number in range(2):
        engine.submit(Request([3, 4 + number], 12))
    for _ in range(6):
        engine.step()
    steps = made[0]
    graph = next(reversed(steps.graphs.values()))
    assert graph.trusted
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
