"""Measures cells of `plan.py`: one process a shape, one cell after the other, as the training loop runs its steps."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from plan_cells import Cell, config_of, examples, method_of, needed, training_config
from shapes import build

from spectune.blocks.cuda_graphs import BEFORE_CAPTURE
from spectune.compute.memory import PeakMemory
from spectune.deltas import attach, detach
from spectune.objectives import CAUSAL_LM
from spectune.planning.estimate import CUDA_CONTEXT
from spectune.storage.base_precision import quantise_base
from spectune.training.decisions import decide
from spectune.training.distribution import World
from spectune.training.loop import Loop
from spectune.training.optimizers import make_optimizer
from spectune.training.run_state import RunState, trained_parameters
from spectune.training.step_batches import Batches

#: of what is predicted: other processes are let onto the device only where so much more is free
MARGIN = 1.1


class Room:
    """Memory of a device that processes share: each says what it needs before a cell, and waits until it is free."""

    def __init__(self, context: Any, total: int) -> None:
        self.total = total
        self._changed = context.Condition()
        self._taken = context.Value("q", 0, lock=False)

    def take(self, size: int, wait: bool) -> bool:
        with self._changed:
            while self._taken.value + size > self.total and self._taken.value > 0:
                if not wait:
                    return False
                self._changed.wait(5)
            self._taken.value += size
            return True

    def give(self, size: int) -> None:
        with self._changed:
            self._taken.value -= size
            self._changed.notify_all()


class Moments:
    """Looks at the parts of a step: largest allocated in forward, after it, in backward, in the optimizer (CUDA)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[str, int] = {}

    def note(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.found[name] = torch.cuda.max_memory_allocated()
            self.found[f"{name}_end"] = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def watch(self, loop: Loop, window: list[list[int]]) -> None:
        loss, step = CAUSAL_LM.loss_sum, loop.run.optimizer.step

        def noted_loss(*args: Any, **kwargs: Any) -> Any:
            found = loss(*args, **kwargs)
            self.note("forward")
            return found

        def noted_step(*args: Any) -> Any:
            self.note("backward")
            found = step(*args)
            self.note("optimizer")
            return found

        CAUSAL_LM.loss_sum = noted_loss
        loop.run.optimizer.step = noted_step  # type: ignore[method-assign]
        try:
            self.note("begin")
            loop.step(window)
        finally:
            CAUSAL_LM.loss_sum = loss
            del loop.run.optimizer.step


@contextlib.contextmanager
def attention_kernels() -> Iterator[set[str]]:
    """Names of the kernels that attention takes inside, as far as it is not compiled."""
    original, names = torch.nn.functional.scaled_dot_product_attention, set[str]()

    def noted(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        names.add(type(out.grad_fn).__name__)
        return out

    torch.nn.functional.scaled_dot_product_attention = noted
    try:
        yield names
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


def clean(device: torch.device) -> None:
    """The allocator as in a new process, but for what lives."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(model: Any, cell: Cell, device: torch.device) -> dict[str, Any]:
    """Steps of the training loop on the cell's one batch: peaks of the first two, moments of the third. Where blocks
    are recorded, peaks are of all steps until they are replayed, and moments of one more.

    What is compiled is compiled before, in a forward and backward pass of its own, whose memory is noted apart: while
    it compiles, the compiler tries kernels out on memory of its own.
    """
    config, rows = training_config(cell), examples(cell)
    delta = attach(model, method_of(cell), "bench")
    decided = decide(config, delta.family, delta.method, [len(row.input_ids) for row in rows], device.type,
                     steps=8, delta=delta)  # fmt: skip
    execution = replace(decided, compiled=cell.compiled, graphs=cell.recorded and device.type == "cuda", cudnn=True)
    packing = execution.packing
    optimizer = make_optimizer(trained_parameters(delta), config, 1e-6)
    batches = Batches(rows, config, packing, World())
    run = RunState(delta, optimizer, batches, [], config, 1e-6, total_steps=8)
    loop, progress = Loop(run, execution), run.progress
    window = [list(range(len(rows)))]
    found: dict[str, Any] = {}
    begin = time.perf_counter()
    try:
        with loop.running():
            if cell.compiled and device.type == "cuda":
                found["while_compiling"] = _compile(loop, window, device)
                found["compile_seconds"] = time.perf_counter() - begin
            clean(device)
            loop.step(window)
            loop.step(window)
            if cell.recorded:
                with PeakMemory(device, count_tensors=False) as peak:
                    for _ in range(BEFORE_CAPTURE + 1):  # traced, captured, proved
                        loop.step(window)
                for kind, size in peak.result.items():
                    peaks = progress.peak_memory_bytes
                    peaks[f"train_{kind}"] = max(size, peaks.get(f"train_{kind}", 0))
            moments = Moments(device)
            with contextlib.nullcontext(set[str]()) if cell.compiled else attention_kernels() as kernels:
                if device.type == "cuda":  # elsewhere there is nothing to look at but the first steps
                    moments.watch(loop, window)
    finally:
        optimizer.close()
        model.eval()
    return found | {
        "measured": {k.removeprefix("train_"): v for k, v in progress.peak_memory_bytes.items()},
        "measured_moments": moments.found,
        "attention": sorted(kernels),
        "packed_by": getattr(packing.kernel, "__name__", None),
        "padding_untold": packing.mask_free,
        "seconds": time.perf_counter() - begin,
        "graphs": int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) if cell.compiled else 0,
    }


def _compile(loop: Loop, window: list[list[int]], device: torch.device) -> dict[str, int]:
    with PeakMemory(device) as peak:
        for packs in loop.batches.of_step(window):
            loop.backward(loop.batches.collate(packs), 1)
        loop.run.optimizer.clear()
    return peak.result


def work(found: list[dict[str, Any]], device_name: str, out: Path, room: Room, lock: Any, deadline: float) -> None:
    """Measure one shape's predicted cells in order. Runs in a process of its own."""
    device = torch.device(device_name)
    holder: _Base = _Base(device)
    try:
        for prediction in found:
            cell = Cell(**{name: prediction[name] for name in Cell.__dataclass_fields__})
            if time.time() > deadline:
                _write(out, lock, {**prediction, "skipped": "not measured: out of time"})
                continue
            size = int(MARGIN * needed(prediction)) + 2**29
            if not room.take(size, wait=False):
                holder.drop()
                room.take(size, wait=True)
            try:
                _write(out, lock, {**prediction, **_try(holder, cell, device)})
            finally:
                holder.keep_only(cell)
                room.give(size)
            if not room.take(holder.bytes, wait=False):
                holder.drop()
            else:
                room.give(holder.bytes)
    finally:
        holder.drop()


class _Base:
    """The model that cells share, until one trains it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model: Any = None
        self.precision: str | None = None

    @property
    def bytes(self) -> int:
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.memory_reserved()) + CUDA_CONTEXT

    def of(self, cell: Cell) -> Any:
        if self.model is None or self.precision != cell.base_precision:
            self.drop()
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            self.model = build(config_of(cell.shape), self.device, dtype)
            self.precision = cell.base_precision
            if cell.base_precision is not None:
                quantise_base(self.model, cell.base_precision)
        return self.model

    def keep_only(self, cell: Cell) -> None:
        """The bare base, or none where it was trained."""
        torch._dynamo.reset()
        if cell.method == "full":
            self.model = None
        elif self.model is not None:
            try:
                detach(self.model, "bench")
            except Exception:
                self.model = None
        clean(self.device)

    def drop(self) -> None:
        self.model = None
        clean(self.device)


def _try(holder: _Base, cell: Cell, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    try:
        torch._dynamo.utils.counters.clear()
        return {**found, **measure(holder.of(cell), cell, device)}
    except Exception as error:
        return {**found, "failed": f"{type(error).__name__}: {error}"[:500]}


def _write(out: Path, lock: Any, cell: dict[str, Any]) -> None:
    with lock, out.open("a") as file:
        file.write(json.dumps(cell) + "\n")
    print(line(cell), flush=True)


def line(cell: dict[str, Any]) -> str:
    """A cell as a line for people."""
    gib = 2**30
    head = f"{cell['shape']:<11} {cell['method']:<8} {cell['rows']}x{cell['length']:<5} {cell['path']:<28}"
    if "measured" not in cell:
        return f"{head} {cell.get('skipped') or cell.get('failed')}"
    predicted, measured = cell["predicted"], cell["measured"]
    for kind in ("allocated", "reserved"):
        if kind in measured:
            ours, theirs = predicted[f"peak_{kind}"], measured[kind]
            head += f" {kind} {ours / gib:.2f} / {theirs / gib:.2f} ({100 * (ours / theirs - 1):+.1f}%)"
    moments = {n: round(m["total"] / gib, 2) for n, m in predicted["moments"].items()}
    seen = {n: round(v / gib, 2) for n, v in cell["measured_moments"].items()}
    return f"{head}  {cell['seconds']:.0f}s {moments} measured {seen}"
