"""What captured blocks keep: the plan against captures that are made on the CPU by what stands for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectune.blocks.cuda_graphs import BEFORE_CAPTURE, graphed
from spectune.blocks.execution import Execution
from spectune.blocks.graphed_block import GraphedBlock, capture_blocks
from spectune.compute.memory import AllocationTracker
from spectune.deltas import Delta, attach
from spectune.errors import ConfigError
from spectune.methods import BitFit, FullFineTuning, LoRA, Method, PrefixTuning, PromptTuning
from spectune.objectives import CAUSAL_LM
from spectune.planning import plan
from spectune.planning.allocator import LARGE_SEGMENT, SMALL_SEGMENT
from spectune.planning.graph_memory import GraphMemory, split_by_graph_pool
from spectune.planning.planner import Planner
from spectune.planning.shape import Shape
from spectune.planning.workload import Workload
from tests.planning.steps import batch
from tests.training.test_compiling import DEPTH, gpt2, llama
from tests.training.test_graphs import Again

ROWS, LENGTH = 3, 20
SHAPE = Shape(ROWS, LENGTH, LENGTH - 1, ROWS * (LENGTH - 1))
HIDDEN = 4 * ROWS * LENGTH * 32


def captured(model: PreTrainedModel, delta: Delta, inputs: dict[str, Tensor]) -> list[GraphedBlock]:
    """The blocks as captured after some passes, one of them replayed."""
    model.train()
    trained = [p for p in delta.parameters() if p.requires_grad]
    with graphed(model, delta.family, trained, capture=Again):
        blocks: Any = (
            model.get_submodule(delta.family.layers[0].path).__dict__["_compiled_call_impl"].call.func.__self__
        )
        for _ in range(BEFORE_CAPTURE + 1):
            loss, _ = CAUSAL_LM.loss_sum(model, inputs)
            loss.backward()  # type: ignore[no-untyped-call]
            for parameter in trained:
                parameter.grad = None
        [found] = blocks.captured.values()
    assert found is not None, "the blocks were not captured"
    return list(found)


def places(blocks: list[GraphedBlock]) -> dict[str, int]:
    """Bytes of what captured blocks hold, each place in memory once, by what it is for."""
    seen: set[int] = set()

    def count(tensors: Any) -> int:
        total = 0
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in seen:
                seen.add(tensor.untyped_storage().data_ptr())
                total += tensor.untyped_storage().nbytes()
        return total

    return {
        "outputs": sum(count(block.outputs) for block in blocks),
        "arguments": sum(count(block.leaves) for block in blocks),
        "hidden": sum(
            count([*block.gradients.of_inputs.values(), *block.gradients.of_outputs.values()]) for block in blocks
        ),
        "weights": sum(count(block.gradients.of_parameters) for block in blocks),
    }


@pytest.mark.parametrize("method", [LoRA(), FullFineTuning(), PrefixTuning(), BitFit(), PromptTuning()], ids=str)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_what_stays_is_what_is_planned(make: Callable[[], PreTrainedModel], method: Method) -> None:
    model = make()
    length = min(LENGTH, 64 - method.virtual_tokens)
    planner = Planner(Workload.of(model, method, torch.float32, "cpu"), Execution(graphs=True))
    static = planner.trace(Shape(ROWS, length, length - 1, ROWS * (length - 1))).buffers
    found = places(captured(model, attach(model, method), batch(ROWS, length, 60)))
    assert found["outputs"] == sum(static.outputs)
    assert found["arguments"] == sum(static.arguments)
    assert found["hidden"] == sum(static.hidden)
    assert found["weights"] == sum(static.weights)
    assert static.bytes == sum(found.values())


def test_by_hand() -> None:
    """Of LoRA on a frozen base: the first block's input has no gradient, the last one's output has."""
    delta = attach(llama(), LoRA(r=4))
    planner = Planner(Workload.of(llama(), LoRA(r=4), torch.float32, "cpu"), Execution(graphs=True))
    static = planner.trace(SHAPE).buffers
    assert planner.built.repeats, "few layers stand for all"
    assert sorted(static.outputs) == [HIDDEN] * DEPTH
    assert sorted(static.hidden) == [HIDDEN] * DEPTH
    assert sum(static.weights) == 4 * delta.num_parameters()
    rotary, positions = 4 * LENGTH * 8, 8 * LENGTH
    assert sum(static.arguments) - HIDDEN - 2 * rotary in (0, positions, 2 * positions)


def test_a_mask_is_copied_once() -> None:
    whole, padded = (
        Planner(Workload.of(gpt2(), LoRA(), torch.float32, "cpu"), Execution(graphs=True))
        .trace(Shape(ROWS, LENGTH, LENGTH - 1, ROWS * (LENGTH - 1), padded))
        .buffers
        for padded in (False, True)
    )
    model = gpt2()
    found = places(captured(model, attach(model, LoRA()), batch(ROWS, LENGTH, 60, shorter=5)))
    assert found["arguments"] == sum(padded.arguments)
    assert sum(padded.arguments) - sum(whole.arguments) == ROWS * LENGTH * LENGTH


def test_recording_makes_no_more_at_once_than_is_planned() -> None:
    """While blocks are captured one after the other, by a tracker that sees each tensor: what a step keeps from forward
    to backward, what captured blocks keep, and what one block's backward takes."""
    model = gpt2()
    delta = attach(model, FullFineTuning())
    trained = list(delta.parameters())
    blocks = captured(model, delta, batch(ROWS, LENGTH, 60))
    plain, calls = [b.function for b in blocks], [b.call for b in blocks]
    with AllocationTracker([*model.parameters(), *model.buffers()]) as tracker:
        before = tracker.live_bytes
        again = capture_blocks(plain, calls, trained, Again())
    made = tracker.live_bytes - before
    there = places(again)
    # positions are an argument that no block here reads
    assert sum(there.values()) - made == 8 * LENGTH
    planner = Planner(Workload.of(gpt2(), FullFineTuning(), torch.float32, "cpu"), Execution(graphs=True))
    found = planner.trace(SHAPE)
    most = tracker.peak_bytes - before
    planned = sum(found.buffers.extra) + max(split_by_graph_pool(found)[0])
    assert most <= 1.02 * planned
    assert most > sum(there.values())


def test_terms_and_peaks_have_what_stays() -> None:
    base, asked = llama().config, {"batch": 8, "length": 128, "dtype": "bfloat16"}
    plain, graphs = (plan(base, "lora", **asked, cuda_graphs=wanted) for wanted in (False, True))
    assert (plain.cuda_graphs, graphs.cuda_graphs) == (False, True)
    assert plain.recordings == 0
    trace = Planner(Workload.of(base, LoRA(), torch.bfloat16, "cuda"), Execution(graphs=True)).trace(
        Shape(8, 128, 127, 8 * 127)
    )
    new, inside = sum(trace.buffers.extra), max(split_by_graph_pool(trace)[0])
    assert 0 < new <= graphs.recordings
    found = GraphMemory.of(trace, ())
    held = found.arguments + found.pool
    assert new + inside <= held <= new + inside + SMALL_SEGMENT + LARGE_SEGMENT
    # whatever moment it is, recordings are there and all memory that blocks take in any
    for before, after in zip(plain.moments, graphs.moments, strict=True):
        assert 0 < after.total - before.total <= held
    assert graphs.moments[-1].total - plain.moments[-1].total == held
    assert plain.peak_allocated + new - 2**16 <= graphs.peak_allocated <= plain.peak_allocated + held
    assert graphs.peak_reserved > graphs.peak_allocated
    assert graphs.to_dict()["recordings"] == graphs.recordings
    assert graphs.question.peaks(8, 128)[0] == max(moment.total for moment in graphs.moments)
    more = plan(base, "lora", **{**asked, "batch": 16}, cuda_graphs=True)
    hidden = 2 * 8 * 128 * 32
    assert more.recordings - graphs.recordings == pytest.approx(2 * DEPTH * hidden + hidden, rel=0.05)


def test_smaller_shapes_find_room_in_the_memory_of_the_largest() -> None:
    workload = Workload.of(llama().config, LoRA(), torch.bfloat16, "cuda")
    trace = Planner(workload, Execution(graphs=True)).trace(Shape.whole(512, 128))
    lean = Planner(workload, Execution(recomputation=True)).trace(Shape.whole(512, 128))
    alone, several = GraphMemory.of(trace, (), lean), GraphMemory.of(trace, (0.8, 0.6, 0.5), lean)
    handed = sum(trace.buffers.outputs) + sum(trace.buffers.hidden)
    assert alone.pool < several.pool < alone.pool + 1.9 * handed + LARGE_SEGMENT
    assert alone.uncaptured == 0
    # a pass of another shape keeps blocks' inputs and recomputes one block at a time
    assert 0.8 * sum(trace.buffers.outputs) < several.uncaptured < 0.5 * max(split_by_graph_pool(trace)[0])


@pytest.mark.slow
def test_compiled_blocks_are_recorded_as_others_are() -> None:
    """What stands around a block is the same; what it keeps inside is the compiler's matter."""
    planned = partial(plan, llama().config, "lora", 512, 64, dtype="bfloat16", torch_compile=True)
    eager = plan(llama().config, "lora", 512, 64, dtype="bfloat16", cuda_graphs=True)
    plain, graphs = planned(), planned(cuda_graphs=True)
    assert graphs.torch_compile
    assert graphs.recordings == eager.recordings
    assert plain.peak_allocated < graphs.peak_allocated < eager.peak_allocated


def test_validation_comes_on_top_of_what_recordings_hold() -> None:
    planned = partial(plan, llama().config, "lora", 8, 64, dtype="bfloat16", validation=8)
    plain, graphs = planned(cuda_graphs=False), planned(cuda_graphs=True)
    assert plain.validation is not None
    assert graphs.validation is not None
    # the pool has what a step makes, too
    assert graphs.validation - plain.validation > graphs.recordings


def test_gradients_of_weights_stay_and_are_copied() -> None:
    base = gpt2().config
    plain, graphs = (plan(base, "full", 2, 32, cuda_graphs=wanted) for wanted in (False, True))
    before, after = (next(m for m in e.moments if m.name == "forward") for e in (plain, graphs))
    in_blocks = 4 * sum(p.numel() for p in gpt2().get_decoder().h.parameters())  # type: ignore[no-untyped-call]
    assert before.terms["gradients"] == 0
    assert after.terms["gradients"] == in_blocks
    assert graphs.gradients - plain.gradients == in_blocks


def test_recomputation_records_nothing_and_no_other_device_can() -> None:
    found = plan(llama().config, "lora", 2, 32, cuda_graphs=True, gradient_checkpointing=True)
    assert (found.cuda_graphs, found.recordings) == (False, 0)
    with pytest.raises(ConfigError, match="need a CUDA device"):
        plan(llama().config, "lora", 2, 32, device="cpu", cuda_graphs=True)
