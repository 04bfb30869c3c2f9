"""Compiled blocks in a traced step: the compiler's own graphs of a block, run for what they do to memory alone.

Dynamo traces a block and autograd's ahead-of-time tracing makes one graph of its forward and backward, which torch's
partitioner cuts in two, all of it as in a run and all of it without a device. What the code of these graphs would hold
in memory is worked out in `liveness.py`, and each call of the block allocates and frees just that.
"""

import contextlib
import functools
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from spectune.blocks.call import Wrapper, wrap
from spectune.blocks.compile import CompiledCall, block_of, compiler_settings
from spectune.planning.kernels import attend_as, scratch_of
from spectune.planning.liveness import Schedule, schedule
from spectune.planning.tracer import Tracer


class CompiledBlocks:
    """The compiled blocks of a model on the meta device. Outside of `running`, and without gradients, they run as they
    are. A block that the compiler cannot trace as a whole raises `torch._dynamo.exc.TorchDynamoException`."""

    def __init__(self, layers: Sequence[nn.Module], memory_budget: float) -> None:
        self.memory_budget = memory_budget
        self.run: Callable[..., Any] | None = None
        # which kernel attention takes follows from this machine's device: not to be traced
        torch.compiler.allow_in_graph(attend_as)  # type: ignore[no-untyped-call]
        wrap(
            layers, Wrapper.COMPILED, lambda _, layer, inner: CompiledCall(layer, self._call, self._runs, memory_budget)
        )

    @contextlib.contextmanager
    def running(self, tracer: Tracer) -> Iterator[None]:
        """Inside, layers run compiled, for one shape of a batch, and the tracer sees their buffers."""
        # of a graph that breaks, the tracer would not see the tensors between its parts
        self.run = torch.compile(block_of(), backend=_backend(tracer), dynamic=False, fullgraph=True)
        try:
            yield
        finally:
            self.run = None

    def _runs(self) -> bool:
        return self.run is not None and torch.is_grad_enabled()

    def _call(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.run is not None
        # the buffers made in here are shown to the tracer one by one; the compiler traces nothing under a mode
        with _disable_current_modes(), compiler_settings(self.memory_budget), _constants(), _no_leftovers():
            return self.run(layer, args, kwargs)


@contextlib.contextmanager
def _constants() -> Iterator[None]:
    """Inside, a block may make tensors of numbers: on the meta device they are not fake, which tracing would refuse."""
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


def _backend(tracer: Tracer) -> Any:
    """A backend of `torch.compile` like inductor's down to the two graphs, with callables that only take memory."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    from spectune.blocks.partition import partition

    def cut(graph: fx.GraphModule, inputs: Any, **settings: Any) -> Any:
        # without inductor's passes over the joint graph: they replace whatever returns tensors without memory. One of
        # them would make these from a number each
        seeded = (torch.ops.aten.rand.default, torch.ops.aten.randn.default)
        return partition(graph, inputs, seeded=seeded, compiler="inductor", **settings)

    def forward(graph: fx.GraphModule, _: Any) -> Any:
        plan = schedule(graph.graph, donates_inputs=False, scratch=_scratch)
        return _player(tracer, plan, lambda: "activations" if tracer.backward else tracer.label)

    def backward(graph: fx.GraphModule, _: Any) -> Any:
        return _player(tracer, schedule(graph.graph, donates_inputs=True, scratch=_scratch), lambda: "workspace")

    return aot_autograd(
        fw_compiler=forward, bw_compiler=backward, partition_fn=cut, decompositions=select_decomp_table()
    )


def _scratch(node: fx.Node) -> int:
    if node.target is not torch.ops.spectune.planned_attention_backward.default:
        return 0
    query, key, value = (operand.meta["val"] for operand in node.args[1:4])  # type: ignore[union-attr]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in scratch_of(query, key, value, str(node.args[6])))


def _player(tracer: Tracer, plan: Schedule, label: Callable[[], str]) -> Callable[[list[Any]], list[Any]]:
    """What stands for the compiled graph: takes its inputs in a list, which it empties, and returns its outputs."""

    def play(inputs: list[Any]) -> list[Any]:
        memory: dict[int, Any] = {~place: tensor for place, tensor in enumerate(inputs)}
        inputs.clear()
        with _disable_current_modes():
            for step, number in plan.steps:
                if step == "free":
                    del memory[number]
                elif step == "allocate":
                    buffer = plan.buffers[number]
                    memory[number] = torch.empty(buffer.elements, dtype=buffer.dtype, device="meta")
                    tracer.see(memory[number], label())
                else:
                    tracer.see(torch.empty(number, dtype=torch.uint8, device="meta"), "workspace")
            return [_view(memory[out[0]], out[1]) if isinstance(out, tuple) else out for out in plan.outputs]

    play._boxed_call = True  # type: ignore[attr-defined]
    return play


def _view(base: Tensor, like: Tensor) -> Tensor:
    if base.shape == like.shape and base.stride() == like.stride() and base.dtype == like.dtype:
        return base
    if base.dtype != like.dtype:
        base = base.flatten().view(like.dtype)
    return base.as_strided(like.shape, like.stride())
