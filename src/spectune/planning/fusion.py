"""What compiled code makes of a graph of operations, and when it frees it: buffers, not intermediate results.

TorchInductor writes no more to memory than it must. Pointwise operations are computed where their result is read;
kernels that go over the same elements become one, and what only they use stays in registers. Written down are results
of reductions, what products and attention read and give, what a graph returns, and pointwise results that are read
often. Here these rules are followed without a device: the graph is the compiler's own, after its partitioner has
decided what is kept from forward to backward.

After torch/_inductor: graph.py (run_node) and ir.py (StorageBox.mark_reuse, has_exceeded_max_reads) for what is written
down, scheduler.py for what is fused, memory.py for the order, codegen/wrapper.py for in-place use of what is read for
the last time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
#: of torch._inductor.config: realize_reads_threshold, and the defaults of realize_opcount_threshold and
#: realize_acc_reads_threshold
REUSED_READS = 4
REUSED_OPERATIONS = 30
MOST_READS = 8
#: how names of inputs begin that are held elsewhere: forward's own inputs, and gradients that come in
_NOT_DONATED = ("primals", "tangents")
#: rounds of fusion, as the scheduler has
_ROUNDS = 10

_VIEWS = {aten._unsafe_view.default, aten.reshape.default}
#: computed where they are read, though they carry no tag that says so
_POINTWISE = {
    "_to_copy", "arange", "cat", "clone", "constant_pad_nd", "convert_element_type", "copy", "empty", "empty_like",
    "empty_strided", "embedding", "flip", "full", "full_like", "gather", "index", "index_select", "iota",
    "lift_fresh_copy", "new_empty", "new_full", "new_ones", "new_zeros", "ones", "ones_like", "rand", "rand_like",
    "randn_like", "repeat", "roll", "scalar_tensor", "select_scatter", "slice_scatter", "tril", "triu", "zeros",
    "zeros_like", "masked_fill", "where", "inductor_random",
}  # fmt: skip
_REDUCTIONS = {
    "sum", "mean", "amax", "amin", "max", "min", "var", "var_mean", "std", "prod", "any", "all", "argmax", "argmin",
    "prepare_softmax_online", "xor_sum", "norm", "logsumexp", "_softmax", "_log_softmax",
}  # fmt: skip


@dataclass
class Buffer:
    """Memory that compiled code writes; `elements` of `dtype`, in one piece."""

    number: int
    elements: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """A tensor of the graph as a view of a buffer (`made`) or of an input (not `made`)."""

    made: bool
    number: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass
class Schedule:
    """What a call of the compiled graph does to memory.

    Attributes:
        steps: ("make", buffer), ("drop", buffer), ("let go", input) or ("scratch", bytes taken and given back).
        outputs: what is returned: a `Source`, or a constant.
    """

    buffers: list[Buffer]
    steps: list[tuple[str, int]]
    outputs: list[Any]


def schedule(graph: fx.Graph, *, lets_go: bool, scratch: Callable[[fx.Node], Iterable[int]]) -> Schedule:
    """How compiled code runs a graph.

    Args:
        lets_go: inputs are the graph's own (backward): freed after their last use, and written over.
        scratch: bytes that an operation takes and gives back within itself.
    """
    kernels = _Kernels(scratch)
    for node in graph.nodes:
        kernels.add(node)
    fused = _fused(kernels)
    best = min(
        (_Timeline(kernels, order, lets_go) for order in (_by_need(fused), _by_memory(fused, kernels))),
        key=lambda timeline: timeline.peak,
    )
    return Schedule(kernels.buffers, best.steps, kernels.outputs)


@dataclass(eq=False)
class _Lazy:
    """A pointwise result that is computed where it is read, until it has a buffer."""

    value: Tensor
    reads: frozenset[int]
    operations: int
    users: int = 0
    buffer: int | None = None


@dataclass
class _Base:
    """What a tensor is a view of: an input (numbers below 0), a buffer, or a result without one."""

    number: int | None = None
    lazy: _Lazy | None = None


@dataclass(eq=False)
class _Kernel:
    """One kernel, or several that were fused."""

    place: int
    reads: set[int]
    writes: set[int]
    #: elements that it goes over, and how many of them make one of its result; None: not to be fused
    domain: tuple[int, int] | None
    scratch: int = 0
    members: list[int] = field(default_factory=list)


class _Kernels:
    """Goes through a graph as the compiler's lowering does. Inputs are numbered -1, -2, ..., buffers 0, 1, ..."""

    def __init__(self, scratch: Callable[[fx.Node], Iterable[int]]) -> None:
        self.buffers: list[Buffer] = []
        self.kernels: list[_Kernel] = []
        self.outputs: list[Any] = []
        self.inputs = 0
        #: inputs that may be written over: what forward kept for backward
        self.donated: dict[int, Buffer] = {}
        self._scratch = scratch
        self._known: dict[fx.Node, Any] = {}

    def add(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.inputs += 1
            self._known[node] = _Base(-self.inputs)
            if isinstance(value := node.meta.get("val"), Tensor) and not node.name.startswith(_NOT_DONATED):
                self.donated[-self.inputs] = Buffer(-self.inputs, value.numel(), value.dtype)
        elif node.op == "get_attr":
            self._known[node] = _Base(None, _Lazy(torch.empty(0, device="meta"), frozenset(), 0))
        elif node.op == "output":
            self.outputs = [self._returned(value) for value in node.args[0]]  # type: ignore[union-attr]
        else:
            self._known[node] = self._call(node)
            self._written_at_once(node)

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        if target is operator.getitem:
            found = self._known[node.args[0]]  # type: ignore[index]
            return found[int(str(node.args[1]))] if isinstance(found, list) else found
        value = node.meta.get("val")
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            return None
        operands = [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]
        bases = [base for operand in operands for base in _flat(self._known.get(operand))]
        name = _name(target)
        if bases and (_is_view(target) or _is_written_into(target)):
            return bases[0]
        if isinstance(value, Tensor) and (name in _POINTWISE or _tagged_pointwise(target)):
            operations = 1 + sum(b.lazy.operations for b in bases if b.lazy is not None and b.lazy.buffer is None)
            return _Base(None, _Lazy(value, frozenset(self._read(bases)), operations))
        if name in _REDUCTIONS:
            inside = max((_elements(operand.meta["val"]) for operand in operands), default=1)
            reads = self._read(bases)
        else:
            inside, reads = 0, {self._write(base) for base in bases}
        return self._run(node, value, reads, inside)

    def _run(self, node: fx.Node, value: Any, reads: set[int], inside: int) -> Any:
        """A kernel of its own for this operation. Returns what its results are views of."""
        made = [self._new(leaf) if isinstance(leaf, Tensor) else None for leaf in _leaves(value)]
        outside = max((_elements(leaf) for leaf in _leaves(value) if isinstance(leaf, Tensor)), default=1)
        domain = (max(inside, outside), max(1, inside // max(1, outside))) if inside else None
        scratch = 0 if inside else sum(self._scratch(node))
        self._append(reads, {n for n in made if n is not None}, domain, scratch)
        bases = [None if number is None else _Base(number) for number in made]
        return bases[0] if isinstance(value, Tensor) else bases

    def _read(self, bases: Iterable[_Base]) -> set[int]:
        """What is read to compute with these where they are."""
        found: set[int] = set()
        for base in bases:
            if base.lazy is None:
                found.add(_number(base))
            elif base.lazy.buffer is not None:
                found.add(base.lazy.buffer)
            else:
                found |= base.lazy.reads
        return found

    def _write(self, base: _Base) -> int:
        """The number of the memory that this is in, once it is."""
        lazy = base.lazy
        if lazy is None:
            return _number(base)
        if lazy.buffer is None:
            lazy.buffer = self._new(lazy.value)
            self._append(set(lazy.reads), {lazy.buffer}, (lazy.value.numel(), 1), 0)
        return lazy.buffer

    def _written_at_once(self, node: fx.Node) -> None:
        """Results that are returned, read by many or computed from many are written down where they are made."""
        base = self._known[node]
        if not isinstance(base, _Base) or base.lazy is None or base.lazy.buffer is not None:
            return
        lazy, users = base.lazy, list(node.users)
        reused = len(users) > 1 and (len(lazy.reads) > REUSED_READS or lazy.operations > REUSED_OPERATIONS)
        returned = any(user.op == "output" for user in users) and not _is_view(node.target)
        read_whole = len(users) > 1 and any(user.op == "call_function" and _is_opaque(user) for user in users)
        if reused or returned or read_whole or len(lazy.reads) > MOST_READS:
            self._write(base)

    def _new(self, value: Tensor) -> int:
        self.buffers.append(Buffer(len(self.buffers), value.numel(), value.dtype))
        return len(self.buffers) - 1

    def _append(self, reads: set[int], writes: set[int], domain: tuple[int, int] | None, scratch: int) -> None:
        place = len(self.kernels)
        self.kernels.append(_Kernel(place, reads - writes, writes, domain, scratch, [place]))

    def _returned(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        base, value = self._known[node], node.meta["val"]
        if not isinstance(value, Tensor):
            return value
        number = self._write(base)
        place = number if number >= 0 else -number - 1
        # a view's place in its base's memory counts for nothing here
        return Source(number >= 0, place, tuple(value.shape), tuple(value.stride()), 0, value.dtype)


def _number(base: _Base) -> int:
    assert base.number is not None
    return base.number


def _flat(found: Any) -> list[_Base]:
    return [base for base in (found if isinstance(found, list) else [found]) if base is not None]


def _leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _elements(value: Any) -> int:
    return max((leaf.numel() for leaf in _leaves(value) if isinstance(leaf, Tensor)), default=1)


def _name(target: Any) -> str:
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else ""


def _is_view(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target in _VIEWS or (target.namespace == "prims" and _name(target) == "broadcast_in_dim"):
        return True
    infos = [found.alias_info for found in target._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _is_written_into(target: Any) -> bool:
    """Whether it writes into its first argument."""
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


def _tagged_pointwise(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _is_opaque(node: fx.Node) -> bool:
    """Whether it reads whole tensors from memory: products, attention, operations that the compiler does not know."""
    target, name = node.target, _name(node.target)
    known = target is operator.getitem or _is_view(target) or _tagged_pointwise(target)
    return not known and name not in _POINTWISE and name not in _REDUCTIONS


def _fused(kernels: _Kernels) -> list[_Kernel]:
    """Kernels after fusion: those over the same elements that share memory, the most of it first."""
    groups = list(kernels.kernels)
    for _ in range(_ROUNDS):
        pairs = _pairs(groups, kernels)
        merged = False
        for first, second in pairs:
            if first in groups and second in groups and not _between(groups, first, second):
                groups[groups.index(first)] = _joined(first, second)
                groups.remove(second)
                merged = True
        if not merged:
            break
    groups.sort(key=lambda kernel: min(kernel.members))
    outside = {source.number for source in kernels.outputs if isinstance(source, Source) and source.made}
    for group in groups:
        elsewhere = set().union(*(other.reads for other in groups if other is not group), outside)
        group.writes &= elsewhere
        group.reads -= {number for number in group.reads if number in _all_writes(group, kernels)}
    return groups


def _all_writes(group: _Kernel, kernels: _Kernels) -> set[int]:
    return set().union(*(kernels.kernels[member].writes for member in group.members))


def _pairs(groups: Sequence[_Kernel], kernels: _Kernels) -> list[tuple[_Kernel, _Kernel]]:
    found = []
    for index, first in enumerate(groups):
        if first.domain is None:
            continue
        for second in groups[index + 1 :]:
            if second.domain is None or not _alike(first.domain, second.domain):
                continue
            shared = (first.reads | first.writes) & (second.reads | second.writes)
            made = [kernels.buffers[number].bytes for number in shared if number >= 0]
            if shared:
                found.append((sum(made), len(shared), first, second))
    found.sort(key=lambda pair: (-pair[0], -pair[1], pair[2].place, pair[3].place))
    return [(first, second) for _, _, first, second in found]


def _alike(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether both go over the same elements, or one over the results of the other."""
    (inside, each), (other, others) = first, second
    if inside == other:
        return each == others or 1 in (each, others)
    return (each > 1 and others == 1 and inside // each == other) or (
        others > 1 and each == 1 and other // others == inside
    )


def _joined(first: _Kernel, second: _Kernel) -> _Kernel:
    assert first.domain is not None
    assert second.domain is not None
    return _Kernel(
        min(first.place, second.place), first.reads | second.reads, first.writes | second.writes,
        max(first.domain, second.domain), 0, [*first.members, *second.members],
    )  # fmt: skip


def _between(groups: Sequence[_Kernel], first: _Kernel, second: _Kernel) -> bool:
    """Whether something has to run after one and before the other."""
    return _reaches(groups, first, second) or _reaches(groups, second, first)


def _reaches(groups: Sequence[_Kernel], start: _Kernel, end: _Kernel) -> bool:
    """Whether a path leads from one to the other through a third."""
    seen: set[int] = set()
    ahead = [g for g in groups if g is not start and g is not end and g.reads & start.writes]
    while ahead:
        here = ahead.pop()
        if end.reads & here.writes:
            return True
        seen.add(id(here))
        ahead += [g for g in groups if id(g) not in seen and g is not start and g.reads & here.writes]
    return False


def _above(kernel: _Kernel, others: Sequence[_Kernel]) -> list[_Kernel]:
    """Those of the others whose results this one is made of."""
    found: list[_Kernel] = []
    ahead = [kernel]
    while ahead:
        here = ahead.pop()
        more = [other for other in others if other.writes & here.reads and other not in found]
        found += more
        ahead += more
    return found


def _by_need(groups: Sequence[_Kernel]) -> list[_Kernel]:
    """In the order of the graph, each after what it reads."""
    maker = {number: group for group in groups for number in group.writes}
    found: list[_Kernel] = []
    seen: set[int] = set()

    def visit(group: _Kernel) -> None:
        if id(group) in seen:
            return
        seen.add(id(group))
        for number in sorted(group.reads):
            if number in maker:
                visit(maker[number])
        found.append(group)

    for group in groups:
        visit(group)
    return found


def _by_memory(groups: Sequence[_Kernel], kernels: _Kernels) -> list[_Kernel]:
    """What frees most, or takes least, of what can run comes first."""
    waiting = list(groups)
    readers: dict[int, set[int]] = {}
    for group in groups:
        for number in group.reads:
            readers.setdefault(number, set()).add(id(group))
    unmade = set().union(*(group.writes for group in groups))
    found: list[_Kernel] = []
    while waiting:
        ready = [group for group in waiting if not group.reads & unmade]

        def taken(group: _Kernel) -> tuple[int, int]:
            made = sum(kernels.buffers[number].bytes for number in group.writes)
            last = [n for n in group.reads if n >= 0 and readers[n] == {id(group)}]
            return made - sum(kernels.buffers[number].bytes for number in last), group.place

        best = min(ready, key=taken)
        waiting.remove(best)
        found.append(best)
        unmade -= best.writes
        for number in best.reads:
            readers[number].discard(id(best))
    return found


class _Timeline:
    """Kernels in an order: what is made and dropped, and the peak of what was made here."""

    def __init__(self, kernels: _Kernels, order: Sequence[_Kernel], lets_go: bool) -> None:
        self.steps: list[tuple[str, int]] = []
        self.peak = 0
        self._kernels = kernels
        self._buffers = kernels.buffers
        self._donated = kernels.donated if lets_go else {}
        self._now = 0
        stay = {source.number if source.made else -source.number - 1
                for source in kernels.outputs if isinstance(source, Source)}  # fmt: skip
        last: dict[int, int] = dict.fromkeys(range(-kernels.inputs, 0), -1)
        for place, group in enumerate(order):
            last |= dict.fromkeys((*group.reads, *group.writes), place)
        ends: dict[int, list[int]] = {}
        for number, place in last.items():
            if number not in stay and (number >= 0 or lets_go):
                ends.setdefault(place, []).append(number)
        self._drop(ends.get(-1, ()))
        for place, group in enumerate(order):
            over = ends.get(place, [])
            written_over = self._written_over(group, over) if group.domain is not None else []
            self._drop(written_over)
            for number in sorted(group.writes):
                self._step("make", number, self._buffers[number].bytes)
            if group.scratch:
                self.steps.append(("scratch", group.scratch))
                self.peak = max(self.peak, self._now + group.scratch)
            self._drop([number for number in over if number not in written_over])

    def _written_over(self, group: _Kernel, over: Sequence[int]) -> list[int]:
        """What the kernel reads for the last time and writes its results over: buffers of the same size and dtype.

        It is decided for each of the kernels that were fused by itself, as it would be without fusion: two that are
        independent and read the same cannot write over it (a gated feed-forward's gradients of gate and up).
        """
        parts = [self._kernels.kernels[member] for member in sorted(group.members)]
        found: list[int] = []
        for part in parts:
            above = _above(part, parts)
            free = [
                number
                for number in sorted(part.reads)
                if number in over
                and not any(number in other.reads for other in parts if other is not part and other not in above)
            ]
            for made in sorted(part.writes & group.writes):
                like = next((n for n in free if n not in found and self._alike(n, made)), None)
                if like is not None:
                    found.append(like)
        return found

    def _alike(self, read: int, made: int) -> bool:
        there = self._buffers[read] if read >= 0 else self._donated.get(read)
        wanted = self._buffers[made]
        return there is not None and (there.elements, there.dtype) == (wanted.elements, wanted.dtype)

    def _drop(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number >= 0:
                self._step("drop", number, -self._buffers[number].bytes)
            else:
                self._step("let go", -number - 1, 0)

    def _step(self, name: str, number: int, size: int) -> None:
        self.steps.append((name, number))
        self._now += size
        self.peak = max(self.peak, self._now)
