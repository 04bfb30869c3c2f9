"""What compiled blocks keep for backward: the plan against blocks that the compiler really compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spectune.blocks.call import Wrapper, wrapped
from spectune.blocks.compile import compiled, memory_budget
from spectune.blocks.execution import Execution
from spectune.deltas import Method, attach
from spectune.methods import LoRA, method_from_name
from spectune.planning.planner import Planner
from spectune.planning.shape import Shape
from spectune.planning.trace import Trace
from spectune.planning.workload import Workload
from spectune.training.decisions import has_cpu_compiler

ROWS, LENGTH = 4, 40
SHAPE = Shape(ROWS, LENGTH, LENGTH - 1, ROWS * (LENGTH - 1))
#: inductor's decompositions and the partitioner that it has, without its kernels
PARTITIONED = "aot_eager_decomp_partition"
SLOW = pytest.mark.slow
#: for what is not about a method: one weight a layer is traced and compiled sooner than seven
ONE_LINEAR = LoRA(target_modules=["down_proj"])


def gpt2(layers: int = 3) -> PreTrainedModel:
    sizes = {"vocab_size": 60, "n_embd": 64, "n_layer": layers, "n_head": 4, "n_positions": 128}
    undropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **undropped, bos_token_id=0, eos_token_id=0))


def llama(layers: int = 3) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
                                        num_attention_heads=4, num_key_value_heads=2))  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def method_of(method: str | Method) -> Method:
    return method_from_name(method) if isinstance(method, str) else method


def alive(trace: Trace, until: int) -> set[int]:
    found: set[int] = set()
    for event in trace.events[:until]:
        (found.add if event >= 0 else found.discard)(max(event, ~event))
    return found


def kept_by_plan(model: PreTrainedModel, method: str | Method, checkpointing: Any) -> int:
    """Bytes that the second block makes and that are there when the last one is done."""
    planner = Planner(
        Workload.of(model, method_of(method), torch.float32, "cpu"),
        Execution(recomputation=checkpointing, compiled=True),
    )
    trace = planner.trace(SHAPE)
    assert planner.execution.compiled, "the compiler could not trace a block"
    marks = dict(trace.marks)
    made = {event for event in trace.events[marks["F1"] : marks["F2"]] if event >= 0}
    return sum(trace.sizes[number] for number in made & alive(trace, marks["head"]))


def kept_by_blocks(model: PreTrainedModel, method: str | Method, backend: str, checkpointing: Any) -> int:
    """Bytes that autograd is given to keep by the second block, and that nobody had before, its output among them."""
    delta = attach(model, method_of(method))
    model.train()
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *delta.parameters()]}
    held, found, inside = [], [], [False]

    def note(tensor: Tensor, counts: bool) -> Tensor:
        held.append(tensor)  # or its place in memory is another's soon
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            if counts:
                found.append(storage.nbytes())
        return tensor

    def watching(_: int, layer: nn.Module, call: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    note(leaf, counts=False)
            inside[0] = True
            output = call(*args, **kwargs)
            inside[0] = False
            for leaf in tree_leaves(output):
                note(leaf, counts=True)
            return output

        return watched

    second = model.get_submodule(delta.family.layers[1].path)
    with (
        compiled(model, delta.family, backend=backend, memory_budget=memory_budget(checkpointing)),
        wrapped([second], Wrapper.MARKED, watching),
    ):
        ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 60
        with torch.autograd.graph.saved_tensors_hooks(lambda t: note(t, inside[0]), lambda t: t):
            model(input_ids=ids, use_cache=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    return sum(found)


@pytest.mark.parametrize(
    ("make", "method"),
    [
        *((llama, method) for method in (ONE_LINEAR, "full")),
        *(pytest.param(llama, method, marks=SLOW) for method in ("lora", "prefix", "bitfit")),
        *(pytest.param(gpt2, method, marks=SLOW) for method in ("lora", "full", "prefix", "bitfit")),
    ],
)
def test_a_block_keeps_what_the_plan_says(make: Callable[[], PreTrainedModel], method: str | Method) -> None:
    planned = kept_by_plan(make(), method, False)
    assert planned == kept_by_blocks(make(), method, PARTITIONED, False)


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (llama, ONE_LINEAR),
        pytest.param(llama, "lora", marks=SLOW),
        pytest.param(gpt2, "lora", marks=SLOW),
    ],
)
@pytest.mark.slow
def test_within_a_budget_too(make: Callable[[], PreTrainedModel], method: str | Method) -> None:
    kept = [kept_by_plan(make(), method, mode) for mode in (False, "selective", True)]
    for planned, mode in zip(kept[1:], ("selective", True), strict=True):
        assert planned == kept_by_blocks(make(), method, PARTITIONED, mode)
    assert kept[0] > kept[1] > kept[2] == ROWS * LENGTH * 64 * 4  # the next block's input alone


@pytest.mark.skipif(not has_cpu_compiler(), reason="compiles kernels for the CPU")
@pytest.mark.parametrize("method", [LoRA(target_modules=["q_proj", "v_proj"]), pytest.param(LoRA(), marks=SLOW)])
def test_inductor_itself_keeps_as_much(method: Method) -> None:
    """It puts narrow products beside each other, which are then views of one tensor, of as many bytes."""
    assert kept_by_plan(llama(), method, False) == kept_by_blocks(llama(), method, "inductor", False)
