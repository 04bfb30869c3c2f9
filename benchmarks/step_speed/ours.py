"""spectune's own training step: `Loop.begin` and `finish` with `MasterAdamW`, as `spectune train` runs it."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.step_speed.data import RATE, RATES, Watched, fill, virtual_tokens
from benchmarks.step_speed.grid import RefusedError
from benchmarks.step_speed.setting import Setting
from pydantic import ValidationError

from spectune.blocks.execution import Execution, Packing
from spectune.data import Example, Row
from spectune.deltas import Delta, attach
from spectune.methods import method_from_name
from spectune.training import TrainingConfig
from spectune.training.distribution import World
from spectune.training.loop import Loop
from spectune.training.optimizer import MasterAdamW
from spectune.training.run_state import RunState
from spectune.training.step_batches import Batches

#: what each system sets of `TrainingConfig`; `base_precision` is applied to the base before the delta is attached
VARIANTS: dict[str, dict[str, Any]] = {
    "ours-eager": {},
    "ours-compiled": {"torch_compile": True},
    "ours-graphs": {"torch_compile": True, "cuda_graphs": True},
    "ours-eager-graphs": {"cuda_graphs": True},
    "ours-selective": {"torch_compile": True, "gradient_checkpointing": "selective"},
    "ours-checkpointed": {"torch_compile": True, "gradient_checkpointing": True},
    "ours-offload": {"torch_compile": True, "gradient_checkpointing": "offload"},
    "ours-fp8": {"torch_compile": True, "base_precision": "fp8"},
    "ours-fp8-graphs": {"torch_compile": True, "base_precision": "fp8", "cuda_graphs": True},
    "ours-fp8-checkpointed": {"torch_compile": True, "base_precision": "fp8", "gradient_checkpointing": True},
    "ours-8bit": {"torch_compile": True, "gradient_checkpointing": True, "optim": "adamw_8bit"},
    # steps as gradients come, so nothing can be clipped
    "ours-in-backward": {
        "torch_compile": True,
        "gradient_checkpointing": True,
        "optim": "adamw_in_backward",
        "max_grad_norm": 0.0,
    },
    "ours-eager-checkpointed": {"gradient_checkpointing": True},
}


def run(setting: Setting) -> dict[str, Any]:
    """Train steps under the setting's meter. Returns what is known of the delta."""
    prepared = prepare(setting, VARIANTS[setting.case.system])
    examples = [Example(ids, 0, Row(origin="", text="")) for batch in setting.batches for ids in batch.tolist()]
    windows = [[list(range(first, first + setting.rows))] for first in range(0, len(examples), setting.rows)]
    with our_step(prepared, examples, setting.most_steps) as step:
        setting.meter.begin()
        for window in itertools.cycle(windows):
            if setting.meter.step(step(window)):
                break
    return prepared.facts()


@dataclass
class Prepared:
    """A base with a delta, and how it is to be trained."""

    model: Any
    delta: Delta
    config: TrainingConfig
    rate: float
    optimizer: Callable[..., MasterAdamW]
    watched: Watched

    def facts(self) -> dict[str, Any]:
        return {"trained_parameters": self.delta.num_trained_parameters(), "changed": self.watched.changed()}


def prepare(setting: Setting, wanted: dict[str, Any]) -> Prepared:
    """Raises RefusedError, before anything is built, where this spectune lacks a part that is wanted."""
    rate = RATES.get(setting.case.method, RATE)
    variant = {"gradient_checkpointing": False, **wanted}
    precision = variant.pop("base_precision", None)
    quantise = part("spectune.storage", "quantise_base") if precision else None
    optimizer = part("spectune.training.optimizers", "make_optimizer") if "optim" in variant else MasterAdamW
    config = configured(setting, rate, variant)

    model = setting.build()
    if quantise is not None:
        quantise(model, precision)
    method = method_from_name(setting.case.method)
    delta = attach(model, method, "bench")
    if not method.trains_base:
        first_weights(delta)
    return Prepared(model, delta, config, rate, optimizer, Watched(delta.parameters()))


def first_weights(delta: Delta) -> None:
    """The weights that peers begin with, too: see `fill`. Virtual tokens come from PEFT's table."""
    if delta.method.virtual_tokens:
        _, tensors = delta.method.to_folder(delta.state_dict(), delta.family)
        table = {name: virtual_tokens(tensor.shape) for name, tensor in tensors.items()}
        delta.load_state_dict(delta.method.from_folder(table, delta.family))
    fill(delta.named_parameters())


@contextlib.contextmanager
def our_step(
    prepared: Prepared,
    examples: Sequence[Example],
    most_steps: int,
    *,
    packing: Packing | None = None,
    cudnn: bool = True,
) -> Iterator[Callable[[list[list[int]]], float | None]]:
    """Inside, a function that takes one optimizer step on the batches of a window (numbers of examples) and returns
    the loss of the last one that was finished: on CUDA the one before."""
    config, delta = prepared.config, prepared.delta
    execution = Execution(
        config.torch_compile is True,
        config.cuda_graphs is True,
        config.gradient_checkpointing,  # type: ignore[arg-type]
        cudnn,
        packing or Packing(),
    )
    optimizer = prepared.optimizer(list(delta.parameters()), config, prepared.rate)
    batches = Batches(examples, config, execution.packing, World())
    loop = Loop(RunState(delta, optimizer, batches, [], config, prepared.rate, most_steps), execution)
    launched = 0

    def ahead(window: list[list[int]]) -> float | None:
        nonlocal launched
        loop.begin(window)
        launched += 1
        return loop.finish() if launched > loop.max_in_flight else None

    with loop.running():
        yield ahead


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
