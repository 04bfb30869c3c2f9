"""What a compiled graph of operations holds in memory, and when: buffers, not intermediate results.

A pointwise result is computed where it is read, and takes memory only where a product or attention reads it as a whole
or the graph returns it. Everything else is written where it is made, in the graph's own order, and freed after its last
use. The graph is the compiler's, after its partitioner has decided what is kept from forward to backward. Which kernels
inductor fuses then, and in which order it runs them, is left out: it moves the peak within a block by a few percent at
most (docs/decisions.md, 2026-11-28).
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
#: how names of inputs begin that are held elsewhere: forward's own inputs, and gradients that come in
_HELD_ELSEWHERE = ("primals", "tangents")
#: views, though their schemas do not say so
_VIEWS = {aten._unsafe_view.default, aten.reshape.default, torch.ops.prims.broadcast_in_dim.default}
#: products that torch counts no operations of
_PRODUCTS = {aten._int_mm, aten._grouped_mm}
Scratch = Callable[[fx.Node], int]


@dataclass(frozen=True)
class Buffer:
    """Memory in one piece: `elements` of `dtype`."""

    elements: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass
class Schedule:
    """What a call of a compiled graph does to memory. Inputs are numbered -1, -2, ..., buffers 0, 1, ...

    Attributes:
        buffers: by number; of inputs those that the graph may write over.
        steps: ("allocate", buffer), ("free", buffer or input) or ("scratch", bytes taken and given back).
        outputs: what is returned: the number of a tensor's memory with one of its shape, strides and dtype, or a
            constant.
    """

    buffers: dict[int, Buffer]
    steps: list[tuple[str, int]]
    outputs: list[Any]


def schedule(graph: fx.Graph, *, donates_inputs: bool, scratch: Scratch) -> Schedule:
    """The memory of a compiled graph.

    Args:
        donates_inputs: inputs are the graph's own (backward): freed after their last use, and written over.
        scratch: bytes that an operation takes and gives back within itself.
    """
    kernels = _Kernels(graph, scratch)
    last = dict.fromkeys(range(-kernels.inputs, 0), -1)
    for place, kernel in enumerate(kernels.order):
        last |= dict.fromkeys((*kernel.reads, *kernel.writes), place)
    returned = {output[0] for output in kernels.outputs if isinstance(output, tuple)}
    ends: dict[int, list[int]] = defaultdict(list)
    for number, place in last.items():
        if number not in returned and (number >= 0 or donates_inputs):
            ends[place].append(number)
    steps = [("free", number) for number in ends[-1]]
    for place, kernel in enumerate(kernels.order):
        reused = kernels.reused_in_place(kernel, ends[place])
        steps += [("free", number) for number in reused]
        steps += [("allocate", number) for number in kernel.writes]
        steps += [("scratch", kernel.scratch)] if kernel.scratch else []
        steps += [("free", number) for number in ends[place] if number not in reused]
    return Schedule(kernels.buffers, steps, kernels.outputs)


@dataclass(eq=False)
class _Result:
    """A tensor of the graph, and the memory that it is read from: its own `number`, or what it is computed from."""

    value: Tensor
    reads: frozenset[int]
    number: int | None = None


@dataclass(frozen=True)
class _Kernel:
    reads: frozenset[int]
    writes: tuple[int, ...]
    pointwise: bool
    scratch: int = 0


class _Kernels:
    """What a graph writes to memory, in its own order."""

    def __init__(self, graph: fx.Graph, scratch: Scratch) -> None:
        self.buffers: dict[int, Buffer] = {}
        self.order: list[_Kernel] = []
        self.outputs: list[Any] = []
        self.inputs = 0
        self._results: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                self._results[node] = self._input(node)
            elif node.op == "get_attr":
                self._results[node] = _Result(torch.empty(0, device="meta"), frozenset())
            elif node.op == "output":
                self.outputs = [self._output(leaf) for leaf in node.args[0]]
            else:
                self._results[node] = self._call(node, scratch)

    def reused_in_place(self, kernel: _Kernel, ended: Iterable[int]) -> list[int]:
        """Of what a pointwise kernel reads for the last time, the memory that it writes its result over."""
        free = [number for number in ended if number in kernel.reads and number in self.buffers]
        likes = [n for n in free if kernel.pointwise and self.buffers[n] == self.buffers[kernel.writes[0]]]
        return likes[:1]

    def _input(self, node: fx.Node) -> _Result:
        self.inputs += 1
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not node.name.startswith(_HELD_ELSEWHERE):
            self.buffers[-self.inputs] = Buffer(value.numel(), value.dtype)
        return _Result(value, frozenset([-self.inputs]), -self.inputs)  # type: ignore[arg-type]

    def _call(self, node: fx.Node, scratch: Scratch) -> Any:
        value, target = node.meta.get("val"), node.target
        if target is operator.getitem:
            parent = self._results[node.args[0]]  # type: ignore[index]
            return parent[int(str(node.args[1]))] if isinstance(parent, list) else parent
        if value is None or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            return None
        given = (self._results[leaf] for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node))
        flat = (result for some in given for result in (some if isinstance(some, list) else [some]))
        operands = [result for result in flat if result is not None]
        if operands and _is_view(target):
            return operands[0]
        reads: frozenset[int] = frozenset().union(*(operand.reads for operand in operands))
        if _is_pointwise(node):
            result = _Result(value, reads)
            if any(user.op == "output" or (len(node.users) > 1 and _reads_whole(user)) for user in node.users):
                self._write(result)
            return result
        if whole := _reads_whole(node):
            reads = frozenset(self._write(operand) for operand in operands)
        leaves = list(value) if isinstance(value, list | tuple) else [value]
        results = [self._written(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        writes = tuple(result.number for result in results if result is not None)
        self.order.append(_Kernel(reads, writes, not whole, scratch(node)))  # type: ignore[arg-type]
        return results if isinstance(value, list | tuple) else results[0]

    def _written(self, value: Tensor) -> _Result:
        number = sum(n >= 0 for n in self.buffers)
        self.buffers[number] = Buffer(value.numel(), value.dtype)
        return _Result(value, frozenset([number]), number)

    def _write(self, result: _Result) -> int:
        """The number of the memory that a result is in, once it is."""
        if result.number is None:
            written = self._written(result.value)
            assert written.number is not None
            self.order.append(_Kernel(result.reads, (written.number,), pointwise=True))
            result.reads, result.number = written.reads, written.number
        return result.number

    def _output(self, leaf: Any) -> Any:
        value = leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf
        return (self._write(self._results[leaf]), value) if isinstance(value, Tensor) else value


def _is_view(target: Any) -> bool:
    """Whether an operation gives its first argument's memory, written into or not."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    infos = [returned.alias_info for returned in target._schema.returns]
    aliases = bool(infos) and all(info is not None and not info.is_write for info in infos)
    return aliases or target in _VIEWS or bool(target._schema.is_mutable)


def _reads_whole(node: fx.Node) -> bool:
    """Whether an operation reads whole tensors from memory: a product, attention, one that torch does not know."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    packet = target.overloadpacket
    return packet in flop_registry or packet in _PRODUCTS or target.namespace not in ("aten", "prims")


def _is_pointwise(node: fx.Node) -> bool:
    """Whether an operation is computed where it is read: it is no product and makes no fewer numbers than it reads."""
    value, target = node.meta["val"], node.target
    if _reads_whole(node) or not isinstance(value, Tensor):
        return False
    operands = [leaf.meta.get("val") for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]
    largest = max((operand.numel() for operand in operands if isinstance(operand, Tensor)), default=0)
    return torch.Tag.pointwise in getattr(target, "tags", ()) or value.numel() >= largest
