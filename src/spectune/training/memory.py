"""What a run will take of memory, said before its first step; refused where it does not fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from spectune.blocks.execution import Execution
from spectune.compute.cudnn import cudnn_allowed
from spectune.data import Example, batches, by_length
from spectune.deltas import Delta
from spectune.errors import DoesNotFitError, first_line
from spectune.planning.estimate import Estimate, shown
from spectune.planning.memory_plan import cheapest_that_fits, plan
from spectune.planning.room import free_memory
from spectune.planning.shape import Shape
from spectune.training.checkpointing import WORDS, Recomputation, modes_of
from spectune.training.config import TrainingConfig
from spectune.training.distribution import World
from spectune.training.loop import MEMORY_STEPS
from spectune.training.packing import Packing
from spectune.training.prepare import Prepared

log = logging.getLogger("spectune")

#: a run is refused where its tensors alone, with this margin for the prediction's error, are more than there is
MARGIN = 1.03
_KEPT = 8
_predictions: dict[object, Predicted] = {}


@dataclass(frozen=True)
class Predicted:
    """What was said of a run before its first step.

    Attributes:
        estimate: of its longest batch, with the optimizer's states: the most that the run takes.
        memory: terms, and the peaks of the first steps, which are what is measured.
        source: "trace" or "full trace" as the estimate says, "none" where the base could not be described, None where
            nobody asked.
        checkpointing: how the run recomputes.
        notice: what the user is told where that was decided here.
    """

    estimate: Estimate | None = None
    memory: dict[str, int] = field(default_factory=dict)
    source: str | None = None
    checkpointing: Recomputation = False
    notice: str | None = None


def predict_memory(
    model: PreTrainedModel,
    delta: Delta,
    prepared: Prepared,
    config: TrainingConfig,
    world: World,
    packing: Packing | None = None,
    *,
    cudnn: bool = True,
    compiling: bool = False,
    recording: bool = False,
) -> Predicted:
    """The plan of this run, with the way of recomputation that it is to take. What keeps the planner from describing a
    base is logged, and keeps nobody from training it: nothing is recomputed then, unless the user said so.

    Args:
        cudnn: the run's steps may take cuDNN's attention (`takes_cudnn`).
        compiling: the run's blocks are compiled.
        recording: they are recorded as CUDA graphs, unless something is recomputed.

    Raises:
        ConfigError: block inputs are to go to host memory, and the model is not on a CUDA device.
    """
    possible = modes_of(model, config.gradient_checkpointing)
    if config.memory_check == "off":
        return Predicted(checkpointing=possible[0])
    free = free_memory(model.device)
    room = 0 if free is None else _room(free, model, delta)
    try:
        how = packing or Packing()
        # a pack's batch has no more tokens than the padded one: what is refused, and advised, is by that
        first = shape_of(_first_steps(prepared.examples, config, world, Packing())[0][0])
        steps = [
            [shape_of(packs, how) for packs in step] for step in _first_steps(prepared.examples, config, world, how)
        ]

        def predicted(mode: Recomputation) -> Predicted:
            # on a CPU a run's first steps, which hold its longest batch, are not compiled: tensors are counted in them
            execution = Execution(compiling and model.device.type != "cpu", recording and mode is False, mode, cudnn)
            return _predicted(model, delta, prepared, config, first, steps, execution, masked=not how.untold)

        if free is None:
            return predicted(possible[0])
        found = cheapest_that_fits(possible, predicted, lambda made: _fits_well(made, room))
    except Exception as error:
        log.warning("the memory of this run is not predicted: %s: %s", type(error).__name__, first_line(error))
        return Predicted(source="none", checkpointing=possible[0])
    if found.checkpointing == possible[0]:
        return found
    assert found.estimate is not None
    plain = predicted(possible[0]).estimate
    assert plain is not None
    notice = (
        f"gradient checkpointing: {WORDS[found.checkpointing]}: predicted {shown(found.estimate.peak_reserved)}, where "
        f"{shown(plain.peak_reserved)} would be taken if {WORDS[possible[0]]}, and {shown(room)} is free"
    )
    if found.estimate.host:
        notice += f"; {shown(found.estimate.host)} of host memory"
    return replace(found, notice=notice)


def _fits_well(predicted: Predicted, room: int) -> bool:
    """Whether there is room for what the allocator holds too (`check_memory` refuses only where tensors alone are too
    many): recomputing costs less than running out of memory. For block inputs, host memory has to suffice."""
    estimate = predicted.estimate
    assert estimate is not None
    return max(estimate.peak_reserved, int(MARGIN * _least(estimate))) <= room and _host_suffices(estimate)


def _host_suffices(estimate: Estimate) -> bool:
    free = free_memory("cpu") if estimate.host else None
    return free is None or estimate.host <= free


def _least(estimate: Estimate) -> int:
    return max(estimate.peak_allocated, estimate.validation or 0)


def _room(free: int, model: PreTrainedModel, delta: Delta) -> int:
    """Bytes for the run: the model is there already, and so is what the plan counts as its weights."""
    return free + sum(t.numel() * t.element_size() for t in {*model.parameters(), *delta.parameters()})


def check_memory(predicted: Predicted, model: PreTrainedModel, delta: Delta, check: str) -> None:
    """Compare with what is free on the model's device.

    Raises:
        DoesNotFitError: it does not fit, and `check` is "refuse".
    """
    estimate, free = predicted.estimate, free_memory(model.device)
    if estimate is None or free is None:
        return
    room, least = _room(free, model, delta), _least(estimate)
    if least * MARGIN <= room and _host_suffices(estimate):
        return
    # the context is the process's and was taken before
    memory = int(room / MARGIN) + estimate.context
    message = (
        f"{delta.method.label} with a batch of {estimate.batch} rows of {estimate.length} tokens is predicted to take "
        f"{shown(least)} of memory ({WORDS[estimate.gradient_checkpointing]}), and {shown(room)} is free for it. "
        + (f"It takes {shown(estimate.host)} of host memory too. " if estimate.host else "")
        + f"{estimate.advice(memory)} {estimate.most(memory)} memory_check=warn tries it all the same."
    )
    if check == "refuse":
        raise DoesNotFitError(message)
    log.warning("%s", message)


def _predicted(
    model: PreTrainedModel,
    delta: Delta,
    prepared: Prepared,
    config: TrainingConfig,
    first: Shape,
    steps: list[list[Shape]],
    execution: Execution,
    *,
    masked: bool,
) -> Predicted:
    """`masked`: rows that are padded in training have an attention mask; in validation they always do."""
    shape, validation = replace(first, padded=first.padded and masked), None
    if prepared.valid:
        judged = shape_of([[row] for row in prepared.valid])
        rows = min(config.per_device_eval_batch_size, judged.rows)
        longest = sorted(prepared.valid, key=lambda row: -len(row.input_ids))[:rows]
        columns = shape_of([[row] for row in longest]).columns
        validation = Shape(rows, judged.length, judged.targets, rows * judged.targets, first.padded, columns)
    weights = sum(t.numel() * t.element_size() for t in model.parameters())
    asked = (shape, validation, execution, config.optim, config.gradient_accumulation_steps, model.device.type)
    asking = repr((asked, steps, cudnn_allowed()))
    key = (type(model), model.config.to_json_string(), str(model.dtype), weights, delta.method, asking)
    if key not in _predictions:
        # a search runs the same steps at many rates
        while len(_predictions) >= _KEPT:
            del _predictions[next(iter(_predictions))]
        with torch.random.fork_rng(devices=[]):
            estimate = plan(model, delta.method, shape, validation=validation, execution=execution, optim=config.optim,
                            gradient_accumulation_steps=config.gradient_accumulation_steps,
                            device=model.device.type)  # fmt: skip
            memory = estimate.of_first_steps(steps).memory()
        _predictions[key] = Predicted(estimate, memory, estimate.source, execution.recomputation)
    return _predictions[key]


def _first_steps(
    examples: Sequence[Example], config: TrainingConfig, world: World, packing: Packing
) -> list[list[list[list[Example]]]]:
    """The batches (of packs of rows) of the steps that are measured, as this process runs them; epoch 0 begins with the
    longest row. Of a step's batches the first two: the others are no longer, and find gradients there as the second
    does."""
    lengths = [len(example.input_ids) for example in examples]
    size = config.per_device_train_batch_size * world.size
    steps = batches(
        lengths,
        size * config.gradient_accumulation_steps,
        seed=config.seed,
        epoch=0,
        group_by_length=config.group_by_length,
    )
    total = config.max_steps if config.max_steps > 0 else round(len(steps) * config.num_train_epochs)
    steps = (steps * MEMORY_STEPS if len(steps) == 1 else steps)[: max(1, min(MEMORY_STEPS, total))]
    found = []
    for step in steps:
        window = by_length(step, lengths, size)
        mine = [batch for batch in packing.of_step(window, lengths, config, world) if batch]
        # a process without rows of its own is taken to have the first ones
        found.append(mine[:2] or [[[row] for row in window[0]]])
    return [[[[examples[row] for row in pack] for pack in batch] for batch in step] for step in found]


def shape_of(packs: Sequence[Sequence[Example]], packing: Packing | None = None) -> Shape:
    """Of a batch of these packs of rows; without `packing`, of one row each, with a mask where it is padded."""
    rows = [[len(row.input_ids) for row in pack] for pack in packs]
    lengths = [sum(pack) for pack in rows]
    targets = [sum(row.target_tokens for row in pack) for pack in packs]
    told = packing is None or not packing.untold
    padded = told and min(lengths) < max(lengths)
    found = Shape(len(packs), max(lengths), max(targets), sum(targets), padded, _columns(packs))
    if packing is None or not packing.on:
        return found
    return replace(found, documents=tuple(map(tuple, rows)), kernel=packing.kernel)


def _columns(packs: Sequence[Sequence[Example]]) -> int:
    """Places of a batch of such rows, packed one after the other or padded on the right, that predict a target of any
    row."""
    found: set[int] = set()
    for pack in packs:
        begin = 0
        for row in pack:
            length = len(row.input_ids)
            found.update(range(begin + max(0, length - row.target_tokens - 1), begin + length - 1))
            begin += length
    return len(found)
