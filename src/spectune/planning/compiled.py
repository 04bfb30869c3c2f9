"""Compiled blocks in a recorded step: the compiler's own graphs of a block, run for what they do to memory alone.

Dynamo traces a block and autograd's ahead-of-time tracing makes one graph of its forward and backward, which torch's
partitioner cuts in two, all of it as in a run and all of it without a device. What would then become kernels is
followed in `fusion.py` instead, and each call of the block makes and frees those buffers.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from spectune.blocks.call import Wrapper, wrap
from spectune.blocks.compile import CompiledCall, block_of, compiler_settings
from spectune.planning.fusion import Buffer, Schedule, Source, schedule
from spectune.planning.kernels import attend_as, scratch_of

if TYPE_CHECKING:
    from spectune.planning.recorder import Recorder


class CompiledBlocks:
    """The compiled blocks of a model on the meta device. Outside of `running`, and without gradients, they run as they
    are. A block that the compiler cannot trace as a whole raises `torch._dynamo.exc.TorchDynamoException`."""

    def __init__(self, layers: Sequence[nn.Module], memory_budget: float) -> None:
        #: told of what blocks make
        self.recorder: Recorder | None = None
        self.memory_budget = memory_budget
        self.run: Callable[..., Any] | None = None
        # which kernel attention takes is asked of this machine: not to be traced
        torch.compiler.allow_in_graph(attend_as)  # type: ignore[no-untyped-call]
        wrap(layers, Wrapper.COMPILED, lambda _, layer, inner: _Call(self, layer))

    @contextlib.contextmanager
    def running(self, recorder: Recorder) -> Iterator[None]:
        """Inside, layers run compiled, for one shape of a batch, and the recorder is told."""
        # a graph that breaks would leave tensors between its parts that nobody tells of
        self.run = torch.compile(block_of(), backend=_backend(self), dynamic=False, fullgraph=True)
        self.recorder = recorder
        try:
            yield
        finally:
            self.recorder = self.run = None


class _Call(CompiledCall):
    """The call of one layer."""

    def __init__(self, blocks: CompiledBlocks, layer: nn.Module) -> None:
        super().__init__(layer, blocks.memory_budget)
        self.blocks = blocks

    def compiles(self) -> bool:
        return self.blocks.run is not None and torch.is_grad_enabled()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.blocks.run is not None
        # what is made in here tells of itself; the compiler traces nothing under a mode
        with _disable_current_modes(), compiler_settings(self.memory_budget), _constants(), _no_leftovers():
            return self.blocks.run(self.layer, args, kwargs)


def is_of_the_compiler(error: Exception) -> bool:
    """Whether the compiler raised it of a block that it cannot trace."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


@contextlib.contextmanager
def _constants() -> Iterator[None]:
    """Inside, a block may make tensors of numbers: those on the meta device are no fake ones to the compiler's tracing,
    which refuses others."""
    mode: Any = FakeTensorMode
    original = mode.__init__

    @functools.wraps(original)
    def allowing(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "allow_non_fake_inputs": True})

    mode.__init__ = allowing
    try:
        yield
    finally:
        mode.__init__ = original


@contextlib.contextmanager
def _no_leftovers() -> Iterator[None]:
    """Afterwards nothing of a trace is left: its cycles hold what a block was called with, and would go when Python's
    collector comes by. It does not come by inside, so that they are still young at the end."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect(1)
        if collects:
            gc.enable()


def _backend(blocks: CompiledBlocks) -> Any:
    """A backend of `torch.compile` like inductor's down to the two graphs, with callables that only take memory."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    from spectune.blocks.partition import partition

    def cut(graph: fx.GraphModule, inputs: Any, **settings: Any) -> Any:
        # without inductor's passes over the joint graph: they replace whatever returns tensors without memory. One of
        # them would make these from a number each
        seeded = (torch.ops.aten.rand.default, torch.ops.aten.randn.default)
        return partition(graph, inputs, seeded=seeded, compiler="inductor", **settings)

    def compiler(backward: bool) -> Callable[..., Any]:
        def compile_graph(graph: fx.GraphModule, _: Any) -> Any:
            return _player(blocks, schedule(graph.graph, lets_go=backward, scratch=_scratch), backward)

        return compile_graph

    return aot_autograd(
        fw_compiler=compiler(False),
        bw_compiler=compiler(True),
        partition_fn=cut,
        decompositions=select_decomp_table(),
    )


def _scratch(node: fx.Node) -> Iterable[int]:
    if node.target is not torch.ops.spectune.planned_attention_backward.default:
        return []
    query, key, value = (operand.meta["val"] for operand in node.args[1:4])  # type: ignore[union-attr]
    room = scratch_of(query, key, value, str(node.args[6]))
    return [math.prod(shape) * dtype.itemsize for shape, dtype in room]


def _player(blocks: CompiledBlocks, plan: Schedule, backward: bool) -> Callable[[list[Any]], list[Any]]:
    """What stands for the compiled graph: takes its inputs in a list, which it empties, and returns its outputs."""

    def play(inputs: list[Any]) -> list[Any]:
        given = list(inputs)
        inputs.clear()
        recorder, live = blocks.recorder, {}
        label = _label(recorder, backward)
        with _disable_current_modes():
            for name, number in plan.steps:
                if name == "make":
                    live[number] = _seen(recorder, _empty(plan.buffers[number]), label)
                elif name == "drop":
                    del live[number]
                elif name == "let go":
                    given[number] = None
                else:
                    _seen(recorder, torch.empty(number, dtype=torch.uint8, device="meta"), "workspace")
            return [_output(found, given, live) for found in plan.outputs]

    play._boxed_call = True  # type: ignore[attr-defined]
    return play


def _label(recorder: Recorder | None, backward: bool) -> str:
    if backward:
        return "workspace"
    return recorder.label if recorder is not None and not recorder.backward else "activations"


def _seen(recorder: Recorder | None, tensor: Tensor, label: str) -> Tensor:
    if recorder is not None:
        recorder.see(tensor, label)
    return tensor


def _empty(buffer: Buffer) -> Tensor:
    return torch.empty(buffer.elements, dtype=buffer.dtype, device="meta")


def _output(found: Any, given: Sequence[Any], live: dict[int, Tensor]) -> Any:
    if not isinstance(found, Source):
        return found
    base = live[found.number] if found.made else given[found.number]
    if not found.made and base.shape == found.shape and base.stride() == found.stride and base.dtype == found.dtype:
        return base
    if base.dtype != found.dtype:
        base = base.flatten().view(found.dtype)
    return base.as_strided(found.shape, found.stride)
