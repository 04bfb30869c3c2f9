"""`plan`: the memory of a training step from the config alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from spectune.deltas import Method
from spectune.errors import ConfigError
from spectune.methods import method_from_name
from spectune.planning.allocator import CachingAllocator
from spectune.planning.estimate import CUDA_CONTEXT, TERMS, Estimate, Moment
from spectune.planning.recorder import Record, Shape
from spectune.planning.step import FEW, Skeleton, record_step, record_validation, skeleton
from spectune.planning.timeline import NotAlikeError, deepened
from spectune.storage.bases import load_config
from spectune.storage.devices import resolve_dtype

#: of cuBLAS, one for each thread that multiplies: forward's and backward's. Hopper and Blackwell; others have less
CUBLAS_WORKSPACE = 32 * 2**20
CUBLAS_WORKSPACE_BEFORE_HOPPER = (4096 * 2 + 16 * 8) * 1024
FLOAT = 4


def plan(
    base: str | Path | PretrainedConfig | PreTrainedModel,
    method: str | Method,
    batch: int = 8,
    length: int = 1024,
    *,
    dtype: str | torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    device: str | torch.device = "cuda",
    targets: int | None = None,
    padded: bool = False,
    eval_batch: int | None = None,
    eval_length: int | None = None,
    eval_targets: int | None = None,
) -> Estimate:
    """Bytes of one training step by term, and its peak. No weights are read or made.

    Args:
        base: a hub id, a folder, "spectune-tiny", a config, or a loaded model.
        method: a config such as `LoRA(r=16)`, or a name.
        batch, length: rows, and tokens of each (virtual ones are the method's, and come on top).
        dtype: of the base; None is what `load` would take on that device, or the loaded model's own.
        device: "cuda" or "cpu": which kernels run. It need not be there.
        targets: tokens of a row that have a loss, at most; None is all but the first.
        padded: some rows are shorter than others, so that attention has a mask.
        eval_batch: rows of a validation batch; None leaves validation out.
        eval_length, eval_targets: of its rows; None is as in training.

    Raises:
        ConfigError: a setting is wrong, or the method cannot act on this base.
        DataError: no such base.
    """
    if batch < 1 or length < 2:
        raise ConfigError(f"batch = {batch}, length = {length}: at least 1 row of 2 tokens is needed")
    method = method_from_name(method) if isinstance(method, str) else method
    place = torch.device(device)
    config = base.config if isinstance(base, PreTrainedModel) else base
    name = str(base) if isinstance(base, str | Path) else str(getattr(config, "_name_or_path", "") or config.model_type)
    if isinstance(base, str | Path):
        base = config = load_config(base)
    if isinstance(base, PreTrainedModel) and dtype is None:
        dtype = base.dtype
    kind = resolve_dtype("auto" if dtype is None else dtype, place, getattr(config, "dtype", None))
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    room = None if context is None else int(context) - method.virtual_tokens
    planner = _Planner(base, method, kind, place.type, gradient_checkpointing, padded)
    step = planner.step(Shape(batch, length, length - 1 if targets is None else min(targets, length - 1), padded))
    validation = None
    if eval_batch is not None:
        tokens = eval_length or length
        count = min(tokens - 1, eval_targets or targets or tokens)
        validation = planner.validation(Shape(eval_batch, tokens, count, padded))

    def again(rows: int, tokens: int) -> int:
        share = 1.0 if targets is None else targets / length
        found = planner.step(Shape(rows, tokens, max(1, min(tokens - 1, round(share * tokens))), padded))
        return found.needed

    built = planner.built
    return Estimate(
        model=name,
        method=method.name,
        batch=batch,
        length=length,
        dtype=str(kind).removeprefix("torch."),
        device=place.type,
        gradient_checkpointing=gradient_checkpointing,
        trainable_parameters=sum(count for count, _ in built.trained),
        total_parameters=built.family.num_parameters,
        **{term: step.largest[term] for term in TERMS},
        peak_allocated=step.peak_allocated,
        peak_reserved=step.peak_reserved,
        context=CUDA_CONTEXT if place.type == "cuda" else 0,
        validation=validation,
        moments=step.moments,
        source="trace" if planner.short else "full trace",
        _again=again,
        _room=room,
    )


@dataclass(frozen=True)
class Step:
    """The memory of a step: what `Estimate` says of it."""

    moments: tuple[Moment, ...]
    largest: dict[str, int]
    peak_allocated: int
    peak_reserved: int
    needed: int


class _Planner:
    """One base, method and setting; `step` and `validation` may be asked for any batch."""

    def __init__(
        self,
        base: PretrainedConfig | PreTrainedModel,
        method: Method,
        dtype: torch.dtype,
        device: str,
        checkpointing: bool,
        padded: bool,
    ) -> None:
        self.settings = (base, method, dtype, checkpointing)
        self.device = device
        self.built, self.short = self._build()

    def _build(self, longest: int = 2**62, *, whole: bool = False) -> tuple[Skeleton, bool]:
        base, method, dtype, checkpointing = self.settings
        built = skeleton(base, method, dtype, longest, checkpointing)
        return built, not whole and built.shorten()

    def step(self, shape: Shape) -> Step:
        record = self._record(record_step, shape)
        return _Sums(self.built, record, self.device).step()

    def validation(self, shape: Shape) -> int:
        """Bytes at the peak of a validation batch; the optimizer's states are there, too."""
        record = self._record(record_validation, shape)
        return _Sums(self.built, record, self.device).validation()

    def _record(self, run: object, shape: Shape) -> Record:
        assert callable(run)
        record: Record = run(self.built, shape, self.device)
        if not self.short:
            return record
        try:
            return deepened(record, self.built.depth - FEW)
        except NotAlikeError:
            self.built, self.short = self._build(whole=True)
            again: Record = run(self.built, shape, self.device)
            return again


class _Sums:
    """Adds what stays to what a record says."""

    def __init__(self, built: Skeleton, record: Record, device: str) -> None:
        self.record = record
        self.cuda = device == "cuda"
        self.weights = [*built.weights, *built.delta_weights]
        #: float32 masters of weights of lower precision; and two moments of each trained weight
        self.masters = [FLOAT * count for count, size in built.trained if size != FLOAT]
        self.states = [FLOAT * count for count, _ in built.trained for _ in range(2)]
        self.states += [FLOAT for _ in built.trained]  # numbers of steps
        #: copies of gradients for the masters, all there while the optimizer steps
        self.copies = list(self.masters)
        self.scratch = _cublas() if self.cuda else 0

    def step(self) -> Step:
        record = self.record
        marks = dict(record.marks)
        backward = min((at for name, at in record.marks if name[0] == "B"), default=len(record.events))
        cuts = [0, marks["head"], backward, len(record.events)]
        signed = [record.sizes[e] if e >= 0 else -record.sizes[~e] for e in record.events]
        live = list(accumulate(signed, initial=0))
        fixed = {
            "weights": sum(self.weights),
            "optimizer": sum(self.masters) + sum(self.states),
            "workspace": self.scratch,
        }
        moments = []
        for name, begin, end in zip(("forward", "loss", "backward"), cuts, cuts[1:], strict=False):
            at = max(range(begin, end + 1), key=live.__getitem__)
            terms = dict.fromkeys(TERMS, 0) | fixed
            for term, size in self._live(at).items():
                terms[term] += size
            moments.append(Moment(name, terms))
        terms = dict.fromkeys(TERMS, 0) | fixed
        terms["gradients"] = self._live(len(record.events)).get("gradients", 0) + sum(self.copies)
        moments.append(Moment("optimizer", terms))
        largest = {term: max(moment.terms[term] for moment in moments) for term in TERMS}
        peak = max(moment.total for moment in moments)
        allocated, reserved = self._played() if self.cuda else (peak, peak)
        context = CUDA_CONTEXT if self.cuda else 0
        return Step(tuple(moments), largest, allocated, reserved, reserved + context)

    def validation(self) -> int:
        signed = [self.record.sizes[e] if e >= 0 else -self.record.sizes[~e] for e in self.record.events]
        stays = sum(self.weights) + sum(self.masters) + sum(self.states) + self.scratch
        return stays + max(accumulate(signed, initial=0))

    def _live(self, until: int) -> dict[str, int]:
        """Bytes by term that live after so many events."""
        found: dict[str, int] = {}
        record = self.record
        for event in record.events[:until]:
            number = event if event >= 0 else ~event
            term, size = record.labels[number], record.sizes[number]
            found[term] = found.get(term, 0) + (size if event >= 0 else -size)
        return found

    def _played(self) -> tuple[int, int]:
        """Peaks of two steps, allocated and reserved, by the allocator's rules. The first makes the moments."""
        allocator = CachingAllocator()
        for size in (*self.weights, *self.masters):
            allocator.take(size)
        record, peak = self.record, 0
        workspaces = {"F0": self.scratch // 2, "head": 0, "B": self.scratch // 2}
        for number in range(2):
            blocks = {}
            begin_backward = next((at for name, at in record.marks if name[0] == "B"), None)
            first = record.marks[0][1] if record.marks else 0
            for index, event in enumerate(record.events):
                if number == 0 and self.scratch:
                    if index == first:
                        allocator.take(workspaces["F0"])
                    if index == begin_backward:
                        allocator.take(workspaces["B"])
                if event >= 0:
                    blocks[event] = allocator.take(record.sizes[event])
                else:
                    allocator.give(blocks.pop(~event))
            copies = [allocator.take(size) for size in self.copies]
            if number == 0:
                for size in self.states:
                    allocator.take(size)
            for block in (*blocks.values(), *copies):
                allocator.give(block)
            peak = max(peak, allocator.peak_allocated)
        return peak, allocator.reserved


def _cublas() -> int:
    """Bytes of cuBLAS's workspaces on this machine's CUDA device, or on a Hopper where there is none."""
    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
    return 2 * (CUBLAS_WORKSPACE if hopper else CUBLAS_WORKSPACE_BEFORE_HOPPER)
