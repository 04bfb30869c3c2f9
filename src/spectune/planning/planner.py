"""The memory of a workload's steps and of its validation, for any batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from spectune.blocks.execution import Execution
from spectune.errors import first_line
from spectune.planning.graph_memory import GraphMemory, graph_buffers
from spectune.planning.repeated_layers import UnlikeLayersError, repeat_layers
from spectune.planning.resident_memory import ResidentMemory
from spectune.planning.shape import Shape
from spectune.planning.skeleton import Skeleton, skeleton
from spectune.planning.trace import TERMS, Moment, Trace
from spectune.planning.training_step import trace_step, trace_validation
from spectune.planning.workload import Workload

log = logging.getLogger("spectune")

#: traces that are kept
_KEPT = 4


@dataclass(frozen=True)
class StepMemory:
    """The memory of a step in bytes: its moments, each term's largest value in any of them, its peaks."""

    moments: tuple[Moment, ...]
    largest: dict[str, int]
    peak_allocated: int
    peak_reserved: int


class Planner:
    """Builds base and method once, without weights, and traces a step of each batch that is planned.

    Attributes:
        execution: how blocks run; not captured where any runs again in backward, and not compiled from when on the
            compiler could not trace one.
        built: of the newest batch; there once one was planned.
    """

    built: Skeleton

    def __init__(self, workload: Workload, execution: Execution, *, all_layers: bool = False) -> None:
        """`all_layers`: trace each, not a few that stand for the others."""
        self.workload, self._all_layers, self._longest = workload, all_layers, 0
        self.execution = execution.recomputing(execution.recomputation)
        #: bytes that CUDA graphs hold of the device between steps
        self._graph_bytes = 0
        #: the newest traces, by batch, training and accumulating
        self._traces: dict[tuple[Shape, bool, bool], Trace] = {}

    def __reduce__(self) -> tuple[type[Planner], tuple[Workload, Execution]]:
        """A copy builds and traces anew."""
        return Planner, (self.workload, self.execution)

    def step(self, shape: Shape) -> StepMemory:
        """The memory of a training step while the optimizer's states are there."""
        first, accumulates = self.trace(shape), self.workload.accumulates
        traces = [first, self.trace(shape, accumulating=True)] if accumulates else [first]
        resident = self._resident(shape)
        moments = resident.moments(traces[-1], accumulating=accumulates)
        largest = {term: max(moment.terms[term] for moment in moments) for term in TERMS}
        return StepMemory(tuple(moments), largest, *resident.peaks([traces, traces]))

    def steps(self, steps: Sequence[Sequence[Shape]]) -> tuple[int, int]:
        """Peaks, allocated and reserved, of some steps of one or more batches each, of which the first has the longest
        rows. The optimizer's states are made at its end."""
        batches = dict.fromkeys((shape, number > 0) for step in steps for number, shape in enumerate(step))
        traces = {(shape, late): self.trace(shape, accumulating=late) for shape, late in batches}
        played = [[traces[shape, number > 0] for number, shape in enumerate(step)] for step in steps]
        return self._resident(steps[0][0]).peaks(played)

    def peak(self, shape: Shape) -> int:
        """The peak of a step's tensors in bytes, without the allocator's rounding: quick."""
        accumulates = self.workload.accumulates
        trace = self.trace(shape, accumulating=accumulates)
        return max(moment.total for moment in self._resident(shape).moments(trace, accumulating=accumulates))

    def graph_buffers(self, shape: Shape) -> int:
        """Bytes of the static buffers of this batch's CUDA graphs; 0 where there are none."""
        buffers = self.trace(shape).buffers
        return 0 if buffers is None else buffers.bytes

    def validation(self, shape: Shape) -> int:
        """Bytes of tensors at the peak of a validation batch, weights and the optimizer's states among them, and all
        memory of the newest step's CUDA graphs."""
        live = self.trace(shape, training=False).live()
        return sum(self._resident().terms.values()) + self._graph_bytes + max(live)

    def trace(self, shape: Shape, *, training: bool = True, accumulating: bool = False) -> Trace:
        """What a step does with this batch, at full depth.

        Args:
            training: forward, loss and backward; else a validation batch's forward and loss.
            accumulating: gradients of an earlier batch are there.
        """
        self._build(shape.length)
        key = (shape, training, accumulating)
        if key not in self._traces:
            trace = self._traced(*key)
            if len(self._traces) >= _KEPT:
                del self._traces[next(iter(self._traces))]
            self._traces[key] = trace
        return self._traces[key]

    def _traced(self, shape: Shape, training: bool, accumulating: bool) -> Trace:
        try:
            few = self._run(shape, training, accumulating)
            trace = repeat_layers(few, self.built.repeats)
        except UnlikeLayersError:
            self._all_layers, self._longest = True, 0
            self._build(shape.length)
            trace = few = self._run(shape, training, accumulating)
        except Exception as error:
            if not self.execution.compiled or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            log.warning(
                "the plan is of blocks that are not compiled, which takes more memory: the compiler cannot trace them "
                "without weights (%s)", first_line(error),
            )  # fmt: skip
            self.execution, self._longest = replace(self.execution, compiled=False), 0
            self._build(shape.length)
            return self._traced(shape, training, accumulating)
        if self.execution.graphs and training:
            built = self.built
            trace.buffers = graph_buffers(built.block_tensors, few, built.repeats, built.whole.in_blocks)
            graphs = GraphMemory.of(trace, self._shares(shape))
            self._graph_bytes = max(self._graph_bytes, graphs.arguments + graphs.pool)
        return trace

    def _run(self, shape: Shape, training: bool, accumulating: bool) -> Trace:
        if training:
            return trace_step(self.built, shape, accumulating=accumulating)
        return trace_validation(self.built, shape)

    def _resident(self, largest: Shape | None = None) -> ResidentMemory:
        """`largest`: the shape of the batch with most tokens, where blocks are captured."""
        shares = () if largest is None else self._shares(largest)
        return ResidentMemory(self.built.whole, self.workload.device, self.workload.optim, shares)

    def _shares(self, largest: Shape) -> tuple[float, ...]:
        """Of the other shapes that are captured, in the largest one's tokens, the largest first."""
        lengths = self.execution.packing.lengths if self.execution.graphs else ()
        virtual = self.workload.method.virtual_tokens
        others = [length for length in reversed(lengths) if length < largest.length]
        return tuple((length + virtual) / (largest.length + virtual) for length in others)

    def _build(self, length: int) -> None:
        """Build anew where rows are longer than any before: sliding windows may make layers differ then."""
        if length <= self._longest:
            return
        self._traces.clear()
        self.built = skeleton(self.workload, self.execution, length, all_layers=self._all_layers)
        self._longest = length
