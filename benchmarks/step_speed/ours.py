"""spectune's own training step: `Loop.step` with `MasterAdamW`, as `spectune train` runs it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.step_speed.data import BATCHES, RATE, RATES, Watched, fill, virtual_tokens
from benchmarks.step_speed.grid import RefusedError
from benchmarks.step_speed.setting import Setting
from pydantic import ValidationError

from spectune.data import Example
from spectune.data.rows import Row
from spectune.deltas import Delta, attach
from spectune.methods import method_from_name
from spectune.training import TrainingConfig
from spectune.training.checkpoint import Progress
from spectune.training.checkpointing import recomputing
from spectune.training.distribution import World
from spectune.training.loop import Keeper, Loop
from spectune.training.optimizer import MasterAdamW

#: what each system sets of `TrainingConfig`; `base_precision` is applied to the base before the delta is attached
VARIANTS: dict[str, dict[str, Any]] = {
    "ours-eager": {},
    "ours-compiled": {"torch_compile": True},
    "ours-checkpointed": {"torch_compile": True, "gradient_checkpointing": True},
    "ours-offload": {"torch_compile": True, "gradient_checkpointing": "offload"},
    "ours-fp8": {"torch_compile": True, "base_precision": "fp8"},
    "ours-fp8-checkpointed": {"torch_compile": True, "base_precision": "fp8", "gradient_checkpointing": True},
    "ours-eager-checkpointed": {"gradient_checkpointing": True},
}


def run(setting: Setting) -> dict[str, Any]:
    """Train steps under the setting's meter. Returns what is known of the delta."""
    rate = RATES.get(setting.case.method, RATE)
    # each optional path is looked for before anything is built: without it the system is refused at once
    variant = dict(VARIANTS[setting.case.system])
    precision = variant.pop("base_precision", None)
    quantise = part("spectune.storage", "quantise_base") if precision else None
    compiling = part("spectune.training.compiling", "compiled") if variant.get("torch_compile") else None
    config = configured(setting, rate, variant)

    model = setting.build()
    if quantise is not None:
        quantise(model, precision)
    method = method_from_name(setting.case.method)
    delta = attach(model, method, "bench")
    if not method.trains_base:
        first_weights(delta)
    watched = Watched(delta.parameters())
    with our_step(model, delta, setting, config, rate, compiling) as step:
        setting.meter.begin()
        number = 0
        while not setting.meter.step(step(number % BATCHES)):
            number += 1
    return {"trained_parameters": delta.num_trained_parameters(), "changed": watched.changed()}


def first_weights(delta: Delta) -> None:
    """The weights that peers begin with, too: see `fill`. Virtual tokens come from PEFT's table."""
    if delta.method.virtual_tokens:
        _, tensors = delta.method.to_folder(delta.state_dict(), delta.family)
        table = {name: virtual_tokens(tensor.shape) for name, tensor in tensors.items()}
        delta.load_state_dict(delta.method.from_folder(table, delta.family))
    fill(delta.named_parameters())


@contextlib.contextmanager
def our_step(
    model: Any, delta: Delta, setting: Setting, config: TrainingConfig, rate: float, compiling: Any
) -> Iterator[Callable[[int], float]]:
    """A function that takes one optimizer step on the batch of a number and returns its loss."""
    rows = setting.rows
    examples = [
        Example(ids, 0, Row(origin=f"row {number}", text=""))
        for number, ids in enumerate(row for batch in setting.batches for row in batch.tolist())
    ]
    optimizer = MasterAdamW(list(delta.parameters()), config, rate)
    keeper = Keeper(lambda: None, lambda: None, lambda _: None, "", lambda: "")
    loop = Loop(
        model, delta, optimizer, examples, [], 0, config, rate, setting.most_steps, Progress(), keeper, World()
    )  # fmt: skip
    model.train()
    with contextlib.ExitStack() as stack:
        stack.enter_context(recomputing(model, config.gradient_checkpointing))
        if compiling is not None:
            stack.enter_context(compiling(model, delta.family, True))
        yield lambda number: loop.step([list(range(number * rows, (number + 1) * rows))])


def configured(setting: Setting, rate: float, variant: dict[str, Any]) -> TrainingConfig:
    try:
        return TrainingConfig(
            per_device_train_batch_size=setting.rows,
            max_steps=setting.most_steps,
            learning_rate=rate,
            lr_scheduler_type="constant",
            warmup_steps=0,
            **variant,
        )
    except ValidationError as error:
        fields = ", ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RefusedError(f"this spectune's TrainingConfig does not take {variant} ({fields})") from error


def part(module: str, name: str) -> Any:
    """A part of spectune that a system needs. Raises RefusedError where this version has none."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RefusedError(f"this spectune has no {module}.{name} ({error})") from error
