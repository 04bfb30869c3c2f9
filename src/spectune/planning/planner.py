"""One base, method and setting, of which any batch may be asked: the memory of its step, and of its validation."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from spectune.blocks.execution import Execution
from spectune.errors import first_line
from spectune.planning.allocator import Block, CachingAllocator
from spectune.planning.compiled import is_of_the_compiler
from spectune.planning.moments import TERMS, Moment
from spectune.planning.recorder import Record
from spectune.planning.recordings import Static, apart, static_of
from spectune.planning.shape import Shape
from spectune.planning.step import Skeleton, record_step, record_validation, skeleton
from spectune.planning.stepping import Stepping
from spectune.planning.timeline import NotAlikeError, deepened
from spectune.planning.workload import Workload

log = logging.getLogger("spectune")

#: of cuBLAS, one for each thread that multiplies: forward's and backward's (aten/src/ATen/cuda/CublasHandlePool.cpp)
CUBLAS_WORKSPACE = 4096 * 8 * 1024
CUBLAS_WORKSPACE_BEFORE_HOPPER = (4096 * 2 + 16 * 8) * 1024
#: records that are kept
_KEPT = 4
#: what an optimizer's step has made and not freed, by name and size
Held = dict[tuple[str, int], list[Block]]


@dataclass(frozen=True)
class Step:
    """The memory of a step: what `Estimate` says of it."""

    moments: tuple[Moment, ...]
    largest: dict[str, int]
    peak_allocated: int
    peak_reserved: int


class Planner:
    """Builds base and method once, without weights; records a step for each batch that it is asked of."""

    def __init__(self, workload: Workload, execution: Execution) -> None:
        self.workload = workload
        self.execution = execution
        self._longest = 0
        #: bytes that recordings hold of the device between steps
        self._held = 0
        #: the newest records, by what was asked
        self._known: dict[tuple[Shape, bool, bool], Record] = {}
        self.built: Skeleton
        #: which of the layers that run stand for how many others; empty where all run
        self.repeats: list[tuple[int, int]]

    def __reduce__(self) -> tuple[type[Planner], tuple[Workload, Execution]]:
        """A copy builds and records anew."""
        return Planner, (self.workload, self.execution)

    @property
    def graphs(self) -> bool:
        """Blocks are captured as CUDA graphs: where none runs again in backward."""
        return self.execution.graphs and self.execution.recomputation is False

    def step(self, shape: Shape) -> Step:
        """The memory of a training step while the optimizer's states are there."""
        first = self._record(shape)
        records = [first, self._record(shape, accumulating=True)] if self.workload.accumulates else [first]
        stays = self._stays()
        moments = stays.moments(records[-1], accumulating=self.workload.accumulates)
        largest = {term: max(moment.terms[term] for moment in moments) for term in TERMS}
        allocated, reserved = stays.peaks([records, records])
        return Step(tuple(moments), largest, allocated, reserved)

    def first_steps(self, steps: Sequence[Sequence[Shape]]) -> tuple[int, int]:
        """Peaks, allocated and reserved, of a run's first steps of one or more batches each. The optimizer's states are
        made at the end of the first."""
        found: dict[tuple[Shape, bool], Record] = {}
        for step in steps:
            for number, shape in enumerate(step):
                if (shape, number > 0) not in found:
                    found[shape, number > 0] = self._record(shape, accumulating=number > 0)
        records = [[found[shape, number > 0] for number, shape in enumerate(step)] for step in steps]
        return self._stays().peaks(records)

    def peak(self, shape: Shape) -> int:
        """The peak of a step's tensors in bytes, not rounded: quick."""
        record = self._record(shape, accumulating=self.workload.accumulates)
        return max(m.total for m in self._stays().moments(record, accumulating=self.workload.accumulates))

    def recordings(self, shape: Shape) -> int:
        """Bytes that recordings of this batch's blocks keep between steps; 0 where none are made."""
        static = self._record(shape).static
        return 0 if static is None else int(static.bytes)

    def validation(self, shape: Shape) -> int:
        """Bytes of tensors at the peak of a validation batch, weights and the optimizer's states among them, and what
        recordings of the newest step hold."""
        record = self._record(shape, training=False)
        return sum(self._stays().terms.values()) + self._held + max(_live(record))

    def _record(self, shape: Shape, *, training: bool = True, accumulating: bool = False) -> Record:
        self._build(shape.length)
        asked = (shape, training, accumulating)
        if asked not in self._known:
            while len(self._known) >= _KEPT:
                del self._known[next(iter(self._known))]
            found = self._made(*asked)
            self._known[asked] = found
        return self._known[asked]

    def _made(self, shape: Shape, training: bool, accumulating: bool) -> Record:
        try:
            record = self._run(shape, training, accumulating)
            found = deepened(record, self.repeats)
        except NotAlikeError:
            self._build(shape.length, whole=True)
            record = found = self._run(shape, training, accumulating)
        except Exception as error:
            if not self.execution.compiled or not is_of_the_compiler(error):
                raise
            log.warning(
                "the plan is of blocks that are not compiled, which takes more memory: the compiler cannot trace them "
                "without weights (%s)", first_line(error),
            )  # fmt: skip
            self.execution, self._longest = replace(self.execution, compiled=False), 0
            self._build(shape.length)
            return self._made(shape, training, accumulating)
        if self.graphs and training:
            found.static = static_of(self.built.calls, record, self.repeats, self.built.in_blocks)
            self._held = sum(found.static.new) + max(apart(found)[0])
        return found

    def _run(self, shape: Shape, training: bool, accumulating: bool) -> Record:
        if training:
            return record_step(self.built, shape, accumulating=accumulating)
        return record_validation(self.built, shape)

    def _stays(self) -> _Stays:
        return _Stays(self.built)

    def _build(self, length: int, *, whole: bool = False) -> None:
        """Anew where rows are longer than any before: sliding windows may make layers differ then."""
        if length <= self._longest and not whole:
            return
        self._known.clear()
        self.built = skeleton(self.workload, length)
        self._longest = 2**62 if whole else length
        self.repeats = [] if whole else self.built.shorten()
        self.built.run_layers_as(self.execution)


class _Stays:
    """What is in memory whatever a step does, and sums of it with what records say of steps."""

    def __init__(self, built: Skeleton) -> None:
        self.cuda = built.workload.device == "cuda"
        self.weights = [*built.weights, *built.delta_weights]
        self.stepping = Stepping(built.trained, built.workload.optim)
        self.gradients = sum(p.numel() * p.element_size() for p in built.trained)
        self.workspace = _cublas() if self.cuda else 0
        self.terms = {
            "weights": sum(self.weights),
            "optimizer": sum(self.stepping.masters) + sum(self.stepping.states),
            "workspace": 2 * self.workspace,
        }

    def moments(self, record: Record, *, accumulating: bool) -> list[Moment]:
        """The parts of a step; `accumulating`: the record is of a batch that finds gradients there. Where blocks are
        recorded, all memory of what they make is theirs at any time."""
        static, inside, live = record.static, [0] * (len(record.events) + 1), _live(record)
        if static is not None:
            inside, live = apart(record)
        most, kept = max(inside), {} if static is None else static.terms()
        head = dict(record.marks).get("head", len(record.events))
        backward = _begin_of_backward(record)
        there = {"gradients": self.gradients} if accumulating else {}
        cuts = (("forward", 0, head), ("loss", head, backward), ("backward", backward, len(record.events)))
        found = []
        for name, begin, end in cuts:
            at = max(range(begin, end + 1), key=live.__getitem__)
            idle = {"workspace": most - inside[at]}
            found.append(self._moment(name, _by_label(record, at), there, kept, idle))
        # in the optimizer nothing but gradients is left, and float32 copies of some of them
        left = _by_label(record, len(record.events)).get("gradients", 0)
        taken = {"gradients": left + self.stepping.most(first=False), "workspace": most}
        return [*found, self._moment("optimizer", taken, there, kept)]

    def _moment(self, name: str, *parts: Mapping[str, int]) -> Moment:
        return Moment(name, {term: sum(part.get(term, 0) for part in (self.terms, *parts)) for term in TERMS})

    def peaks(self, steps: Sequence[Sequence[Record]]) -> tuple[int, int]:
        """Allocated and reserved of some steps, one record a batch; the optimizer's states are made in the first."""
        found = self._played(steps) if self.cuda else self._counted(steps)
        static = steps[0][0].static
        if static is None:
            return found
        replayed = self._with_a_pool(steps, static)
        return max(found[0], replayed), max(found[1], replayed)

    def _counted(self, steps: Sequence[Sequence[Record]]) -> tuple[int, int]:
        """Of tensors alone."""
        peak, states = 0, 0
        for records in steps:
            stays = self.terms["weights"] + sum(self.stepping.masters) + states
            for number, record in enumerate(records):
                peak = max(peak, stays + (self.gradients if number else 0) + max(_live(record)))
            left = _by_label(records[0], len(records[0].events)).get("gradients", 0)
            peak = max(peak, stays + left + self.stepping.most(first=not states))
            states = sum(self.stepping.states)
        return peak, peak

    def _played(self, steps: Sequence[Sequence[Record]]) -> tuple[int, int]:
        """The same by the rules of CUDA's allocator."""
        allocator = CachingAllocator()
        for size in (*self.weights, *self.stepping.masters):
            allocator.take(size)
        held: Held = defaultdict(list)
        static = steps[0][0].static
        for size in static.new if static is not None else ():
            allocator.take(size)
        for number, records in enumerate(steps):
            blocks: dict[tuple[int, int], Block] = {}
            for batch, record in enumerate(records):
                # each of the two threads that multiply takes cuBLAS's workspace when it first does
                products = {record.marks[0][1], _begin_of_backward(record)} if number == batch == 0 else set()
                for index, event in enumerate(record.events):
                    if index in products:
                        allocator.take(self.workspace)
                    if event >= 0:
                        blocks[batch, event] = allocator.take(record.sizes[event])
                    else:
                        allocator.give(blocks.pop((batch, ~event)))
            for (batch, event), block in blocks.items():
                held["gradient", records[batch].sizes[event]].append(block)
            _play_step(allocator, self.stepping.events(first=number == 0), held)
            for (name, _), rest in held.items():
                while name == "gradient" and rest:
                    allocator.give(rest.pop())
        return allocator.peak_allocated, allocator.reserved

    def _with_a_pool(self, steps: Sequence[Sequence[Record]], static: Static) -> int:
        """Bytes of the device once blocks are replayed: what is made outside of them has no use of their memory."""
        parts = [apart(record) for record in {id(record): record for records in steps for record in records}.values()]
        inside, outside = (max(max(part[number]) for part in parts) for number in (0, 1))
        left = _by_label(steps[0][0], len(steps[0][0].events)).get("gradients", 0)
        accumulated = self.gradients if any(len(records) > 1 for records in steps) else 0
        outside = max(outside, left + self.stepping.most(first=False)) + accumulated
        return sum((*self.terms.values(), *static.new, inside, outside))


def _play_step(allocator: CachingAllocator, events: Iterable[tuple[str, int]], held: Held) -> None:
    """The optimizer's step. What is freed is told from others of its name by its size alone."""
    for name, size in events:
        if size > 0:
            held[name, size].append(allocator.take(size))
        elif there := held[name, -size]:
            allocator.give(there.pop())


def _begin_of_backward(record: Record) -> int:
    """The first event of the layers' backward; the end where there is none."""
    return min((at for name, at in record.marks if name[0] == "B"), default=len(record.events))


def _live(record: Record) -> list[int]:
    """Bytes after 0, 1, 2, ... events."""
    return list(accumulate(map(record.signed, record.events), initial=0))


def _by_label(record: Record, until: int) -> dict[str, int]:
    """Bytes by label after `until` events."""
    return _summed((record.labels[max(e, ~e)], record.signed(e)) for e in record.events[:until])


def _summed(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, size in pairs:
        found[name] = found.get(name, 0) + size
    return found


def _cublas() -> int:
    """Bytes of one cuBLAS workspace on this machine's CUDA device, or on a Hopper where there is none."""
    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
    return CUBLAS_WORKSPACE if hopper else CUBLAS_WORKSPACE_BEFORE_HOPPER
