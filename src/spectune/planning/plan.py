"""`plan`: the memory of a training step, from the config alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from spectune.blocks.recompute import Recomputation, modes
from spectune.deltas import Method
from spectune.errors import ConfigError
from spectune.families import base_precision as base_precision_of
from spectune.methods import method_from_name
from spectune.planning.estimate import CUDA_CONTEXT, TERMS, Estimate
from spectune.planning.planner import Planner
from spectune.planning.recorder import Shape
from spectune.planning.room import free_memory
from spectune.planning.step import FEW
from spectune.sizes import bytes_of
from spectune.storage.base_precision import base_dtype, check_precision
from spectune.storage.bases import load_config

P = TypeVar("P")


def plan(
    base: str | Path | PretrainedConfig | PreTrainedModel,
    method: str | Method,
    batch: int = 8,
    length: int = 1024,
    *,
    dtype: str | torch.dtype | None = None,
    base_precision: str | None = None,
    gradient_checkpointing: Recomputation | Literal["auto"] = False,
    torch_compile: bool = False,
    cuda_graphs: bool = False,
    memory: int | str | None = None,
    optim: str = "adamw_torch_fused",
    gradient_accumulation_steps: int = 1,
    device: str | torch.device = "cuda",
    targets: int | None = None,
    all_targets: int | None = None,
    columns: int | None = None,
    padded: bool = False,
    eval_batch: int | None = None,
    eval_length: int | None = None,
    eval_targets: int | None = None,
    eval_padded: bool | None = None,
    eval_columns: int | None = None,
) -> Estimate:
    """Bytes of one training step by term, and its peak. No weights are read or made, and no device is needed.

    Args:
        base: a hub id, a folder, "spectune-tiny", a config, or a loaded model.
        method: a config such as `LoRA(r=16)`, or a name.
        batch, length: rows, and tokens of each; a method's virtual tokens come on top.
        dtype: of the base; None is what `load` takes on that device, or the loaded model's own.
        base_precision: "fp8", "nf4", "int8", see `load`; None is the loaded model's own, else none.
        gradient_checkpointing: as in `TrainingConfig`; "auto" is the first of none, "selective", True and "offload"
            that fits into `memory`, and the last of them where none does.
        torch_compile: blocks are compiled. Whether a run compiles (`TrainingConfig`'s "auto") follows from its length,
            which is not known here: `spectune plan --data` and `train` ask that.
        cuda_graphs: blocks are recorded, where nothing is recomputed. What the recordings of one shape of a batch keep
            from step to step is added (`spectune.planning.recordings`).
        memory: bytes, or "24GiB", for "auto"; None is what is free on that device here, if anybody can tell.
        optim: as in `TrainingConfig`.
        device: "cuda", "cpu" or "mps": which kernels run.
        targets: tokens with a loss of the row that has most; None is all but the first.
        all_targets: those of all rows; None is as many in each row.
        columns: places that predict a target in some row; None is all. It counts only where a model's head is no plain
            linear and its `logits_to_keep` takes places that all rows share.
        padded: some rows are shorter than others, so that attention has a mask.
        eval_batch: rows of a validation batch; None leaves validation out.
        eval_length, eval_targets, eval_columns, eval_padded: of its rows; None is as in training, all columns.

    Raises:
        ConfigError: a setting is wrong, the base has no room for that length, the method cannot act on this base, or
            block inputs are to go to host memory on another device than CUDA.
        DataError: no such base.
    """
    asked: dict[str, Any] = locals()
    place = torch.device(device)
    possible = modes(asked.pop("gradient_checkpointing"), place.type)
    memory = asked.pop("memory")
    if len(possible) > 1 and (free := free_memory(place) if memory is None else bytes_of(memory)) is not None:
        return cheapest_that_fits(possible, lambda mode: _plan(**asked, mode=mode), lambda found: found.fits(free))
    return _plan(**asked, mode=possible[0])


def cheapest_that_fits(
    possible: Sequence[Recomputation], planned: Callable[[Recomputation], P], fits: Callable[[P], bool]
) -> P:
    """The first plan that fits, in the order of what may be done; the last one where none does."""
    for mode in possible:
        found = planned(mode)
        if fits(found):
            break
    return found


def _plan(
    base: str | Path | PretrainedConfig | PreTrainedModel,
    method: str | Method,
    batch: int,
    length: int,
    dtype: str | torch.dtype | None,
    base_precision: str | None,
    mode: Recomputation,
    torch_compile: bool,
    cuda_graphs: bool,
    optim: str,
    gradient_accumulation_steps: int,
    device: str | torch.device,
    targets: int | None,
    all_targets: int | None,
    columns: int | None,
    padded: bool,
    eval_batch: int | None,
    eval_length: int | None,
    eval_targets: int | None,
    eval_padded: bool | None,
    eval_columns: int | None,
) -> Estimate:
    """`plan`, with recomputation decided."""
    if batch < 1 or length < 2:
        raise ConfigError(f"batch = {batch}, length = {length}: at least 1 row of 2 tokens is needed")
    if cuda_graphs and torch.device(device).type != "cuda":
        raise ConfigError(f"cuda_graphs = True on {device}: CUDA graphs need a CUDA device, leave them out")
    method = method_from_name(method) if isinstance(method, str) else method
    place = torch.device(device)
    name = _name(base)
    described: Any = load_config(base) if isinstance(base, str | Path) else base
    config: Any = described.config if isinstance(described, PreTrainedModel) else described
    if isinstance(described, PreTrainedModel) and dtype is None:
        dtype = described.dtype
    precision = _precision(described, base_precision)
    kind = base_dtype("auto" if dtype is None else dtype, place, getattr(config, "dtype", None), precision)
    context = context_of(config)
    room = None if context is None else context - method.virtual_tokens
    if room is not None and length > room:
        extra = f" and {method.virtual_tokens} virtual ones of {method.label}" if method.virtual_tokens else ""
        raise ConfigError(f"{length} tokens{extra}, but this base has {context} positions: at most {room} tokens")
    planner = Planner(
        described, method, kind, place.type, base_precision=precision,
        checkpointing=mode, compiled=torch_compile, recorded=cuda_graphs and mode is False,
        optim=optim, accumulating=gradient_accumulation_steps > 1,
    )  # fmt: skip
    share = min(targets or length, length - 1) / (length - 1)

    def shape(rows: int, tokens: int) -> Shape:
        each = max(1, round(share * (tokens - 1)))
        return Shape(rows, tokens, each, rows * each, padded, _part(columns, length, tokens))

    def judged(tokens: int) -> int | None:
        if eval_batch is None:
            return None
        longest = tokens if eval_length is None else min(eval_length, tokens)
        each = min(longest - 1, eval_targets or round(share * (longest - 1)))
        masked = padded if eval_padded is None else eval_padded
        return planner.validation(Shape(eval_batch, longest, each, eval_batch * each, masked, eval_columns))

    def peaks(rows: int, tokens: int) -> tuple[int, int]:
        return planner.peak(shape(rows, tokens)), judged(tokens) or 0

    asked = shape(batch, length)
    step = planner.step(asked if all_targets is None else replace(asked, all_targets=all_targets))
    validation = judged(length)
    built = planner.built
    return Estimate(
        model=name,
        method=method.name,
        batch=batch,
        length=length,
        dtype=str(kind).removeprefix("torch."),
        device=place.type,
        gradient_checkpointing=mode,
        optim=optim,
        torch_compile=planner.compiled,
        cuda_graphs=planner.recorded,
        recordings=planner.recordings(asked),
        trainable_parameters=sum(parameter.numel() for parameter in built.trained),
        total_parameters=built.family.num_parameters,
        **{term: step.largest[term] for term in TERMS},
        peak_allocated=step.peak_allocated,
        peak_reserved=step.peak_reserved,
        context=CUDA_CONTEXT if place.type == "cuda" else 0,
        host=built.host_bytes,
        validation=validation,
        moments=step.moments,
        source="trace" if planner.repeats or built.depth <= FEW else "full trace",
        _peaks=peaks,
        _first_steps=planner.first_steps,
        _room=room,
        base_precision=precision,
    )


def _part(columns: int | None, length: int, tokens: int) -> int | None:
    """So many of the columns of rows of `length` tokens, where they are `tokens` long."""
    return None if columns is None else max(1, round(columns * (tokens - 1) / (length - 1)))


def _precision(described: Any, asked: str | None) -> str | None:
    check_precision(asked)
    if not isinstance(described, PreTrainedModel):
        return asked
    own = base_precision_of(described)
    if asked not in (None, own):
        raise ConfigError(f"base_precision = {asked}, and the model given was loaded with {own}: plan it by name")
    return own


def _name(base: str | Path | PretrainedConfig | PreTrainedModel) -> str:
    if isinstance(base, str | Path):
        return str(base)
    config: Any = base.config if isinstance(base, PreTrainedModel) else base
    return str(getattr(config, "_name_or_path", "") or config.model_type)


def context_of(config: Any) -> int | None:
    """Positions of a base with this config; None where there is no limit."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else int(context)
