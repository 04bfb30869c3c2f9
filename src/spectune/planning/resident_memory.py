"""What is in memory across steps, and the peaks of steps on top of it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from spectune.compute.memory import has_expandable_segments
from spectune.planning.allocator import LARGE_SEGMENT, Block, CachingAllocator
from spectune.planning.graph_memory import GraphMemory, split_by_graph_pool
from spectune.planning.optimizer_memory import OptimizerStep
from spectune.planning.skeleton import WholeModel
from spectune.planning.trace import TERMS, Moment, Trace

#: of cuBLAS, one for each thread that multiplies: forward's and backward's (aten/src/ATen/cuda/CublasHandlePool.cpp)
CUBLAS_WORKSPACE = 4096 * 8 * 1024
CUBLAS_WORKSPACE_BEFORE_HOPPER = (4096 * 2 + 16 * 8) * 1024
#: what the allocator holds unused beside CUDA graphs: half a segment for each stream's and the graphs' large tensors
GRAPHS_UNUSED = 3 * LARGE_SEGMENT // 2


class ResidentMemory:
    """Memory that persists across steps, in bytes, and the peaks of steps on top of it.

    Attributes:
        gradients: of all weights that are trained.
        workspace: of cuBLAS, for one thread.
        terms: what persists, by term.
    """

    def __init__(self, whole: WholeModel, device: str, optim: str, shares: Sequence[float] = ()) -> None:
        """`shares`: of other shapes that are captured as CUDA graphs, as `GraphMemory.of` has it."""
        self.cuda, self.shares = device == "cuda", shares
        self.weights = whole.weights
        self.optimizer = OptimizerStep(whole.trained, optim)
        self.gradients = sum(p.numel() * p.element_size() for p in whole.trained)
        self.workspace = _cublas() if self.cuda else 0
        self.terms = {
            "weights": sum(self.weights),
            "optimizer": sum(self.optimizer.masters) + sum(self.optimizer.states),
            "workspace": 2 * self.workspace,
        }

    def moments(self, trace: Trace, *, accumulating: bool) -> list[Moment]:
        """The parts of a step; `accumulating`: the trace is of a batch that finds gradients there. Where blocks are
        captured as CUDA graphs, all memory of what they make is the graphs' at any time."""
        buffers, inside, live = trace.buffers, [0] * (len(trace.events) + 1), trace.live()
        static, idle = dict[str, int](), 0
        if buffers is not None:
            inside, live = split_by_graph_pool(trace)
            graphs, static = GraphMemory.of(trace, self.shares), buffers.terms()
            static["activations"] += graphs.arguments - sum(buffers.arguments)
            idle = graphs.pool - sum(buffers.extra) + sum(buffers.arguments)
        accumulated = {"gradients": self.gradients} if accumulating else {}
        head, backward, end = trace.head, trace.begin_of_backward, len(trace.events)
        moments = []
        for name, first, last in (("forward", 0, head), ("loss", head, backward), ("backward", backward, end)):
            at = max(range(first, last + 1), key=live.__getitem__)
            rest = {"workspace": idle - inside[at]}
            moments.append(self._moment(name, trace.by_label(at), accumulated, static, rest if buffers else {}))
        # in the optimizer nothing but gradients is left, and float32 copies of some of them
        gradients = trace.by_label().get("gradients", 0) + self.optimizer.most(first=False)
        return [*moments, self._moment("optimizer", {"gradients": gradients, "workspace": idle}, accumulated, static)]

    def _moment(self, name: str, *parts: Mapping[str, int]) -> Moment:
        return Moment(name, {term: sum(part.get(term, 0) for part in (self.terms, *parts)) for term in TERMS})

    def peaks(self, steps: Sequence[Sequence[Trace]]) -> tuple[int, int]:
        """Bytes allocated and reserved at the peak of some steps, one trace a batch; the optimizer's states are made in
        the first. Where blocks are captured, the first is of the largest shape."""
        if (graphed := steps[0][0]).buffers is not None:
            return self._with_graph_pool(steps, GraphMemory.of(graphed, self.shares))
        return self._played(steps) if self.cuda else self._counted(steps)

    def _counted(self, steps: Sequence[Sequence[Trace]]) -> tuple[int, int]:
        """`peaks` of tensors alone."""
        peak, states = 0, 0
        for traces in steps:
            resident = self.terms["weights"] + sum(self.optimizer.masters) + states
            for number, trace in enumerate(traces):
                peak = max(peak, resident + (self.gradients if number else 0) + max(trace.live()))
            gradients = traces[0].by_label().get("gradients", 0)
            peak = max(peak, resident + gradients + self.optimizer.most(first=not states))
            states = sum(self.optimizer.states)
        return peak, peak

    def _played(self, steps: Sequence[Sequence[Trace]]) -> tuple[int, int]:
        """`peaks` by the rules of CUDA's allocator."""
        allocator = CachingAllocator(expandable=has_expandable_segments())
        for size in (*self.weights, *self.optimizer.masters):
            allocator.take(size)
        #: what the optimizer's steps have made and not freed, by name and size
        held: dict[tuple[str, int], list[Block]] = defaultdict(list)
        for number, traces in enumerate(steps):
            blocks: dict[tuple[int, int], Block] = {}
            for batch, trace in enumerate(traces):
                # each of the two threads that multiply takes cuBLAS's workspace when it first does
                products = {trace.marks[0][1], trace.begin_of_backward} if number == batch == 0 else set()
                for index, event in enumerate(trace.events):
                    if index in products:
                        allocator.take(self.workspace)
                    if event >= 0:
                        blocks[batch, event] = allocator.take(trace.sizes[event])
                    else:
                        allocator.give(blocks.pop((batch, ~event)))
            for (batch, event), block in blocks.items():
                held["gradient", traces[batch].sizes[event]].append(block)
            # of tensors of one name, the one that is freed is told by its size alone
            for name, size in self.optimizer.events(first=number == 0):
                if size > 0:
                    held[name, size].append(allocator.take(size))
                elif made := held[name, -size]:
                    allocator.give(made.pop())
            for (name, _), rest in held.items():
                while name == "gradient" and rest:
                    allocator.give(rest.pop())
        return allocator.peak_allocated, allocator.reserved

    def _with_graph_pool(self, steps: Sequence[Sequence[Trace]], graphs: GraphMemory) -> tuple[int, int]:
        """`peaks` where blocks are replayed: what is made outside of the graphs cannot use their memory."""
        traces = {id(trace): trace for traces in steps for trace in traces}
        outside = max(max(split_by_graph_pool(trace)[1]) for trace in traces.values())
        gradients = steps[0][0].by_label().get("gradients", 0)
        accumulated = self.gradients if any(len(traces) > 1 for traces in steps) else 0
        outside = max(outside, graphs.uncaptured, gradients + self.optimizer.most(first=False)) + accumulated
        allocated = sum((*self.terms.values(), graphs.arguments, graphs.pool, outside))
        return allocated, allocated + GRAPHS_UNUSED


def _cublas() -> int:
    """Bytes of one cuBLAS workspace on this machine's CUDA device, or on a Hopper where there is none."""
    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
    return CUBLAS_WORKSPACE if hopper else CUBLAS_WORKSPACE_BEFORE_HOPPER
