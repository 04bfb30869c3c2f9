"""What a run will take of memory, said before its first step; refused where it does not fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from spectune.data import Example, batches, by_length
from spectune.deltas import Delta
from spectune.errors import DoesNotFitError, first_line
from spectune.planning.estimate import Estimate, shown
from spectune.planning.plan import plan
from spectune.planning.room import free_memory
from spectune.training.config import TrainingConfig
from spectune.training.distribution import World
from spectune.training.prepare import Prepared

log = logging.getLogger("spectune")

#: a run is refused where its tensors alone, with this margin for the prediction's error, are more than there is
MARGIN = 1.03
_KEPT = 8
_estimates: dict[object, Estimate] = {}


@dataclass(frozen=True)
class Predicted:
    """`source`: "trace" or "full trace" as the estimate says, "none" where the base could not be described, None where
    nobody asked."""

    estimate: Estimate | None
    source: str | None


def predict_memory(
    model: PreTrainedModel, delta: Delta, prepared: Prepared, config: TrainingConfig, world: World
) -> Predicted:
    """The plan of this run's longest batch, which is its first one, and of its validation. Never raises: what keeps
    the planner from describing a base is logged, and keeps nobody from training it."""
    if config.memory_check == "off":
        return Predicted(None, None)
    try:
        estimate = _estimate(model, delta, prepared, config, world)
    except Exception as error:
        log.warning("the memory of this run is not predicted: %s: %s", type(error).__name__, first_line(error))
        return Predicted(None, "none")
    return Predicted(estimate, estimate.source)


def check_memory(predicted: Predicted, model: PreTrainedModel, delta: Delta, check: str) -> None:
    """Compare with what is free on the model's device.

    Raises:
        DoesNotFitError: it does not fit, and `check` is "refuse".
    """
    estimate, free = predicted.estimate, free_memory(model.device)
    if estimate is None or free is None:
        return
    # the model is there already, and so is what the plan counts as its weights
    room = free + sum(t.numel() * t.element_size() for t in {*model.parameters(), *delta.parameters()})
    least = max(estimate.peak_allocated, estimate.validation or 0)
    if least * MARGIN <= room:
        return
    # the context is the process's and was taken before
    memory = int(room / MARGIN) + estimate.context
    message = (
        f"{delta.method.label} with a batch of {estimate.batch} rows of {estimate.length} tokens is predicted to take "
        f"{shown(least)} of memory, and {shown(room)} is free for it. {estimate.advice(memory)} The most that fits: "
        f"{estimate.largest_batch(memory)} rows of {estimate.length} tokens (per_device_train_batch_size), or "
        f"{estimate.largest_length(memory)} tokens in {estimate.batch} rows (max_length). memory_check=warn tries it "
        "all the same."
    )
    if check == "refuse":
        raise DoesNotFitError(message)
    log.warning("%s", message)


def _estimate(
    model: PreTrainedModel, delta: Delta, prepared: Prepared, config: TrainingConfig, world: World
) -> Estimate:
    first = _longest_batch(prepared.examples, config, world)
    longest = max(prepared.valid, key=lambda example: len(example.input_ids), default=None)
    asked = {
        "batch": len(first),
        "length": max(len(example.input_ids) for example in first),
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "device": model.device.type,
        "targets": max(example.target_tokens for example in first),
        "all_targets": sum(example.target_tokens for example in first),
        "padded": len({len(example.input_ids) for example in first}) > 1,
        "eval_batch": None if longest is None else min(config.per_device_eval_batch_size, len(prepared.valid)),
        "eval_length": None if longest is None else len(longest.input_ids),
        "eval_targets": max((example.target_tokens for example in prepared.valid), default=None),
    }
    weights = sum(t.numel() * t.element_size() for t in model.parameters())
    key = (type(model), model.config.to_json_string(), str(model.dtype), weights, delta.method, *asked.values())
    if key not in _estimates:
        # a search runs the same step at many rates
        while len(_estimates) >= _KEPT:
            del _estimates[next(iter(_estimates))]
        with torch.random.fork_rng(devices=[]):
            _estimates[key] = plan(model, delta.method, **asked)  # type: ignore[arg-type]
    return _estimates[key]


def _longest_batch(examples: Sequence[Example], config: TrainingConfig, world: World) -> Sequence[Example]:
    """The rows of the first batch of epoch 0 that this process runs: the batch that holds the longest row."""
    lengths = [len(example.input_ids) for example in examples]
    size = config.per_device_train_batch_size * world.size
    steps = batches(
        lengths,
        size * config.gradient_accumulation_steps,
        seed=config.seed,
        epoch=0,
        group_by_length=config.group_by_length,
    )
    rows = by_length(steps[0], lengths, size)[0]
    return [examples[row] for row in world.share(rows) or rows]
