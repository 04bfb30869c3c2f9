"""One base, method and setting, of which any batch may be asked: the memory of its step, and of its validation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from transformers import PretrainedConfig, PreTrainedModel

from spectune.deltas import Method
from spectune.planning.allocator import CachingAllocator
from spectune.planning.estimate import TERMS, Moment
from spectune.planning.recorder import Record, Shape
from spectune.planning.step import FEW, Skeleton, record_step, record_validation, skeleton
from spectune.planning.timeline import NotAlikeError, deepened

#: of cuBLAS, one for each thread that multiplies: forward's and backward's (aten/src/ATen/cuda/CublasHandlePool.cpp)
CUBLAS_WORKSPACE = 4096 * 8 * 1024
CUBLAS_WORKSPACE_BEFORE_HOPPER = (4096 * 2 + 16 * 8) * 1024
FLOAT = 4


@dataclass(frozen=True)
class Step:
    """The memory of a step: what `Estimate` says of it."""

    moments: tuple[Moment, ...]
    largest: dict[str, int]
    peak_allocated: int
    peak_reserved: int


class Planner:
    """Builds base and method once, without weights; records a step for each batch that it is asked of."""

    def __init__(
        self,
        base: PretrainedConfig | PreTrainedModel,
        method: Method,
        dtype: torch.dtype,
        device_type: str,
        *,
        checkpointing: bool = False,
        accumulating: bool = False,
    ) -> None:
        self.settings = (base, method, dtype, checkpointing)
        self.device_type = device_type
        self.accumulating = accumulating
        self._longest = 0
        self.built: Skeleton
        self.short: bool

    def step(self, shape: Shape) -> Step:
        """The memory of a training step, played by the rules of CUDA's allocator where that is the device."""
        return self._sums(shape).step(self.device_type)

    def peak(self, shape: Shape) -> int:
        """The peak of a step's tensors in bytes, not rounded: quick."""
        return self._sums(shape).peak()

    def validation(self, shape: Shape) -> int:
        """Bytes of tensors at the peak of a validation batch, weights and the optimizer's states among them."""
        record = self._record(shape, training=False)
        sums = _Sums(self.built, record, self.device_type)
        return sums.fixed_bytes + max(_live(record))

    def _sums(self, shape: Shape) -> _Sums:
        record = self._record(shape, training=True)
        return _Sums(self.built, record, self.device_type, accumulating=self.accumulating)

    def _record(self, shape: Shape, *, training: bool) -> Record:
        self._build(shape.length)
        if self.short:
            try:
                return deepened(self._run(shape, training), self.built.depth - FEW)
            except NotAlikeError:
                self._build(shape.length, whole=True)
        return self._run(shape, training)

    def _run(self, shape: Shape, training: bool) -> Record:
        if training:
            return record_step(self.built, shape, self.device_type, accumulating=self.accumulating)
        return record_validation(self.built, shape, self.device_type)

    def _build(self, length: int, *, whole: bool = False) -> None:
        """Anew where rows are longer than any before: sliding windows may make layers differ then."""
        if length <= self._longest and not whole:
            return
        base, method, dtype, checkpointing = self.settings
        self.built = skeleton(base, method, dtype, length, checkpointing)
        self._longest = 2**62 if whole else length
        self.short = not whole and self.built.shorten()


class _Sums:
    """Adds what stays in memory to what a record says of a step."""

    def __init__(self, built: Skeleton, record: Record, device_type: str, *, accumulating: bool = False) -> None:
        self.record = record
        self.weights = [*built.weights, *built.delta_weights]
        # float32 masters of weights of lower precision; two moments and the number of steps of each trained weight
        self.masters = [FLOAT * count for count, size in built.trained if size != FLOAT]
        self.states = [FLOAT * count for count, _ in built.trained for _ in range(2)] + [FLOAT for _ in built.trained]
        #: gradients that were there before, where they are added up over batches
        self.gradients = [count * size for count, size in built.trained] if accumulating else []
        self.workspace = _cublas() if device_type == "cuda" else 0
        self.fixed = {
            "weights": sum(self.weights),
            "optimizer": sum(self.masters) + sum(self.states),
            "gradients": sum(self.gradients),
            "workspace": 2 * self.workspace,
        }
        self.fixed_bytes = sum(self.fixed.values())

    def peak(self) -> int:
        return self.fixed_bytes + max(max(_live(self.record)), self._at_the_end() + sum(self.masters))

    def step(self, device_type: str) -> Step:
        moments = self._moments()
        largest = {term: max(moment.terms[term] for moment in moments) for term in TERMS}
        peak = max(moment.total for moment in moments)
        allocated, reserved = self._played() if device_type == "cuda" else (peak, peak)
        return Step(tuple(moments), largest, allocated, reserved)

    def _moments(self) -> list[Moment]:
        record, live = self.record, _live(self.record)
        head = dict(record.marks).get("head", len(record.events))
        backward = _begin_of_backward(record)
        cuts = (("forward", 0, head), ("loss", head, backward), ("backward", backward, len(record.events)))
        found = []
        for name, begin, end in cuts:
            at = max(range(begin, end + 1), key=live.__getitem__)
            found.append(Moment(name, self._terms(_by_label(record, at))))
        # in the optimizer nothing but gradients is left; those of the masters are float32 copies, all made at once
        left = {"gradients": self._at_the_end() + sum(self.masters)}
        return [*found, Moment("optimizer", self._terms(left))]

    def _terms(self, live: dict[str, int]) -> dict[str, int]:
        return {term: self.fixed.get(term, 0) + live.get(term, 0) for term in TERMS}

    def _at_the_end(self) -> int:
        return _by_label(self.record, len(self.record.events)).get("gradients", 0)

    def _played(self) -> tuple[int, int]:
        """Peaks of two steps, allocated and reserved, by the allocator's rules; the first one makes the moments."""
        record, allocator = self.record, CachingAllocator()
        for size in (*self.weights, *self.masters, *self.gradients):
            allocator.take(size)
        first_product = record.marks[0][1] if record.marks else 0
        products = {first_product, _begin_of_backward(record)} if self.workspace else set()
        for number in range(2):
            blocks = {}
            for index, event in enumerate(record.events):
                if number == 0 and index in products:
                    allocator.take(self.workspace)
                if event >= 0:
                    blocks[event] = allocator.take(record.sizes[event])
                else:
                    allocator.give(blocks.pop(~event))
            copies = [allocator.take(size) for size in self.masters]
            if number == 0:
                for size in self.states:
                    allocator.take(size)
            for block in (*blocks.values(), *copies):
                allocator.give(block)
        return allocator.peak_allocated, allocator.reserved


def _begin_of_backward(record: Record) -> int:
    """The first event of the layers' backward; the end where there is none."""
    return min((at for name, at in record.marks if name[0] == "B"), default=len(record.events))


def _live(record: Record) -> list[int]:
    """Bytes after 0, 1, 2, ... events."""
    return list(accumulate((_signed(record, event) for event in record.events), initial=0))


def _by_label(record: Record, until: int) -> dict[str, int]:
    """Bytes by label after `until` events."""
    return _summed((record.labels[max(e, ~e)], _signed(record, e)) for e in record.events[:until])


def _summed(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, size in pairs:
        found[name] = found.get(name, 0) + size
    return found


def _signed(record: Record, event: int) -> int:
    return record.sizes[event] if event >= 0 else -record.sizes[~event]


def _cublas() -> int:
    """Bytes of one cuBLAS workspace on this machine's CUDA device, or on a Hopper where there is none."""
    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
    return CUBLAS_WORKSPACE if hopper else CUBLAS_WORKSPACE_BEFORE_HOPPER
