"""Plans of compiled blocks, as a whole: consistent, at full depth from a few layers, and said where there is none."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from spectune.blocks.execution import Execution
from spectune.deltas import Method
from spectune.methods import PrefixTuning
from spectune.planning import plan
from spectune.planning.planner import Planner
from spectune.planning.shape import Shape
from spectune.planning.workload import Workload
from tests.planning.test_compiled_blocks import LENGTH, ONE_LINEAR, ROWS, SHAPE, fresh_compiler, llama

__all__ = ["fresh_compiler"]


@pytest.mark.parametrize(
    "method", [ONE_LINEAR, pytest.param(PrefixTuning(), marks=pytest.mark.slow)], ids=["lora", "prefix"]
)
def test_few_layers_stand_for_many(method: Method) -> None:
    workload = Workload.of(llama(7), method, torch.bfloat16, "cuda")
    short, whole = (Planner(workload, Execution(compiled=True), all_layers=every) for every in (False, True))
    assert short.peak(SHAPE) == whole.peak(SHAPE)
    assert short.step(SHAPE).peak_reserved == whole.step(SHAPE).peak_reserved
    assert short.execution.compiled
    assert whole.execution.compiled
    assert short.built.repeats
    assert not whole.built.repeats


@pytest.mark.slow
def test_a_plan_does_not_depend_on_when_garbage_is_collected() -> None:
    """What tracing leaves behind held a block's positions until the collector came by, or did not."""
    before, peaks = gc.get_threshold(), set()
    try:
        for often in ((0, 0, 0), (50, 2, 2)):
            gc.set_threshold(*often)
            torch._dynamo.reset()
            peaks.add(
                Planner(Workload.of(llama(), ONE_LINEAR, torch.bfloat16, "cuda"), Execution(compiled=True)).peak(SHAPE)
            )
    finally:
        gc.set_threshold(*before)
    assert len(peaks) == 1


@pytest.mark.slow  # that they take less, and how much, is held by tests/planning/test_compiled_blocks.py, too
def test_compiled_blocks_take_less_and_recomputed_ones_keep_their_input() -> None:
    base = llama(6).config
    asked: dict[str, Any] = {"batch": Shape(8, 512, 8, 64), "dtype": "bfloat16"}
    eager, fast, lean = (
        plan(base, ONE_LINEAR, **asked, torch_compile=compiled, gradient_checkpointing=mode)
        for compiled, mode in ((False, False), (True, False), (True, True))
    )
    assert (eager.torch_compile, fast.torch_compile, lean.torch_compile) == (False, True, True)
    assert eager.peak_allocated > fast.peak_allocated > lean.peak_allocated
    deeper = plan(llama(12).config, ONE_LINEAR, **asked, torch_compile=True, gradient_checkpointing=True)
    assert (deeper.activations - lean.activations) / 6 == pytest.approx(2 * 8 * 512 * 64, rel=0.02)


def test_what_the_compiler_cannot_trace_is_planned_as_it_is_and_said(caplog: pytest.LogCaptureFixture) -> None:
    class Breaks(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp.register_forward_hook(self._breaks)

        @staticmethod
        def _breaks(module: Any, args: Any, output: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return output

    model = Breaks(llama().config)
    with caplog.at_level(logging.WARNING, logger="spectune"):
        found = plan(model, "lora", ROWS, LENGTH, device="cpu", torch_compile=True)
    assert not found.torch_compile
    assert "the plan is of blocks that are not compiled" in caplog.text
    plain = plan(model, "lora", ROWS, LENGTH, device="cpu")
    assert found.peak_allocated == plain.peak_allocated


def test_a_plan_leaves_the_compiler_s_settings_and_the_process_alone() -> None:
    import torch._functorch.config as functorch
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = functorch.activation_memory_budget, functorch.ban_recompute_used_far_apart, FakeTensorMode.__init__
    model = llama()
    plan(model, ONE_LINEAR, ROWS, LENGTH, device="cpu", torch_compile=True, gradient_checkpointing="selective")
    after = functorch.activation_memory_budget, functorch.ban_recompute_used_far_apart, FakeTensorMode.__init__
    assert after == before
    assert not any("_compiled_call_impl" in module.__dict__ for module in model.modules())
