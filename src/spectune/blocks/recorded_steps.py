"""Decoding steps as CUDA graphs: one launch a step, where Python launches some hundreds of kernels otherwise.

A step of a small batch is over on the device before Python has launched the next kernel, at any size of base: what a
step costs is its kernels' number. A graph is recorded for each number of rows and each capacity (both in powers of two)
and replayed on the same memory: everything that changes from step to step lies in tensors that the step reads (ids,
places, slots of deltas), so that one graph serves any mixture of deltas. A graph is compared with the plain step
before it is trusted.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from spectune.blocks.graphed_block import CudaCapture
from spectune.errors import first_line

log = logging.getLogger("spectune")

#: graphs that are kept, of a way to run, a number of rows and a capacity each: those used last
MOST_GRAPHS = 64
#: the least capacity of a graph
LEAST_CAPACITY = 128
#: by how much logits may differ from those of the plain step, of their norm: rounding of other kernels adds up over
#: blocks, in bfloat16 to some percent of 32
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 3e-2}
#: and from those of the same kernels, unrecorded
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}

#: how it is run, rows, capacity
_Key = tuple[Hashable, int, int]
#: rows, capacity -> logits, float32 `[rows, vocabulary]`. A step that runs twice does the same twice.
Run = Callable[[int, int], Tensor]


class StepOutput(NamedTuple):
    """What a step gave; the next step may write over it.

    Attributes:
        logits: float32 `[rows, vocabulary]`.
        tokens: int64 `[rows]`, the likeliest of each row.
    """

    logits: Tensor
    tokens: Tensor


class Steps(Protocol):
    """How decoding steps are run.

    Attributes:
        costly: a step of another shape takes seconds once.
    """

    costly: bool

    def __call__(self, rows: int, capacity: int, how: Hashable = None) -> StepOutput:
        """The first `rows` rows, each over its own places before `capacity`. `how`: steps of another way to run (bare,
        by tables) are others."""

    def rows_for(self, active: int) -> int:
        """How many rows a step takes where `active` are to be run."""

    def capacity_for(self, needed: int, capacity: int) -> int:
        """How many places a step takes where the longest row has `needed` and the cache has `capacity`."""

    def forget(self) -> None:
        """What a step reads was replaced: the cache, the tables of deltas."""


class PlainSteps:
    """Every step as it is."""

    costly = False

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, rows: int, capacity: int, how: Hashable = None) -> StepOutput:
        return _greedy(self.run(rows, capacity))

    def rows_for(self, active: int) -> int:
        return active

    def capacity_for(self, needed: int, capacity: int) -> int:
        return min(needed, capacity)

    def forget(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class Form:
    """A way to run a step that is recorded. `around`: entered for each run, with the step's rows and capacity."""

    name: str
    around: Callable[[int, int], AbstractContextManager[None]] = lambda rows, capacity: nullcontext()


class StepCapture(CudaCapture):
    """Records steps. All graphs share a pool: a step's logits are read before the next is run.

    All engines record in one stream, torch's own for that: libraries keep a workspace for each stream that they have
    seen, and what is recorded goes on using it."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        recording: Any = torch.cuda.graph
        stream = recording.default_capture_stream
        if stream is None or stream.device.index != torch.cuda.current_device():
            stream = recording.default_capture_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.stream = stream

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Run it where it will be captured: libraries make their workspaces there, kernels are compiled and tuned."""
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            function()
            function()
        outside.wait_stream(self.stream)


@dataclass
class _Graph:
    """A recorded step. `trusted`: it was compared with the plain one, on another step than it was recorded on."""

    output: StepOutput
    replay: Callable[[], None]
    trusted: bool = False


class RecordedSteps:
    """Steps that are recorded when they are run first, and replayed from then on.

    Where a form cannot be recorded, or its replay gives other logits than the plain step, the log says so and the next
    one is tried; after the last one every step is run as it is.
    """

    def __init__(
        self, run: Run, dtype: torch.dtype, forms: Sequence[Form] = (Form("a step as it is"),), *,
        costly: bool = False, capture: Callable[[], StepCapture] = StepCapture,
    ) -> None:  # fmt: skip
        """`dtype`: of the base. `forms`: ways to run a step that give the same, those preferred first; `costly`: they
        are compiled."""
        self.costly = costly
        self.run, self.dtype, self.make_capture = run, dtype, capture
        self.forms = list(forms)
        self.graphs: OrderedDict[_Key, _Graph] = OrderedDict()
        self.capture: StepCapture | None = None

    def rows_for(self, active: int) -> int:
        return _power(active)

    def capacity_for(self, needed: int, capacity: int) -> int:
        return min(max(_power(needed), LEAST_CAPACITY), capacity)

    def forget(self) -> None:
        """Let go of all graphs, and of the memory that only they hold."""
        self.graphs.clear()
        self.capture = None

    def __call__(self, rows: int, capacity: int, how: Hashable = None) -> StepOutput:
        key = how, rows, capacity
        graph = self.graphs.get(key)
        if graph is not None and graph.trusted:
            self.graphs.move_to_end(key)
            graph.replay()
            return graph.output
        plain = _greedy(self.run(rows, capacity))
        if not self.forms:
            return plain
        if graph is None:
            self._record(key)
        else:
            graph.replay()
            self._compare(graph, rows, capacity, plain.logits)
        return plain

    def _record(self, key: _Key) -> None:
        _, rows, capacity = key

        def step() -> list[Any]:
            return list(self._step(rows, capacity))

        try:
            if self.capture is None:
                self.capture = self.make_capture()
            self.capture.warm_up(step)
            output, replay = self.capture.capture(step)
        # a compiler's errors are of many kinds
        except Exception as error:
            self._give_up(first_line(error))
            return
        while len(self.graphs) >= MOST_GRAPHS:
            self.graphs.popitem(last=False)
        self.graphs[key] = _Graph(StepOutput(*output), replay)

    def _step(self, rows: int, capacity: int) -> StepOutput:
        """A step in the form that is recorded now."""
        with self.forms[0].around(rows, capacity):
            return _greedy(self.run(rows, capacity))

    def _compare(self, graph: _Graph, rows: int, capacity: int, plain: Tensor) -> None:
        """Trust a graph that was just replayed, or give up its form: with the same kernels unrecorded, which tells
        whether it reads what changes, and with the plain step."""
        found = graph.output.logits
        for of, expected, bounds in (("form", self._step(rows, capacity).logits, _SAME), ("step", plain, _CLOSE)):
            apart, bound = _apart(expected, found), bounds.get(self.dtype, bounds[torch.float32])
            if not apart <= bound:
                self._give_up(f"its replay gives other logits than the {of} itself: {apart:.2g} of their norm apart")
                return
            log.debug("decoding: %d rows, %d places: %.2g from the %s itself", rows, capacity, apart, of)
        graph.trusted = True

    def _give_up(self, reason: str) -> None:
        """Go on with the next form. What was begun in the graphs' pool cannot be taken back."""
        form, *others = self.forms
        self.forms = others
        then = f"{others[0].name} is tried" if others else "steps run without CUDA graphs"
        log.warning("decoding: %s cannot be recorded (%s): %s", form.name, reason, then)
        self.forget()


def _apart(expected: Tensor, found: Tensor) -> float:
    """By how much logits differ, of their norm; infinitely where others are finite."""
    there = expected.isfinite()
    if not bool((there == found.isfinite()).all()):
        return math.inf
    expected = torch.where(there, expected.double(), 0.0)
    difference = torch.where(there, found.double(), 0.0) - expected
    return float(difference.norm() / expected.norm().clamp(min=torch.finfo(torch.double).tiny))


def _greedy(logits: Tensor) -> StepOutput:
    return StepOutput(logits, logits.argmax(-1))


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()
