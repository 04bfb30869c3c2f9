"""What each of two processes does for `tests/training/test_processes.py`: everything in one launch, for it takes a
while until torch is there.

Run by torchrun, or in forks that are told what torchrun tells, with the folder in which the rows, and one process's
checkpoint, are, and results are left; with names of cases behind it for these alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from spectune.cli import main
from spectune.deltas import Method, attached
from spectune.errors import DoesNotFitError, SpectuneError
from spectune.methods import METHODS, BottleneckAdapter, LoRA, PrefixTuning, PromptTuning
from spectune.objectives import CAUSAL_LM
from spectune.training import RunResult, TrainingConfig, starting, train
from spectune.training import loop as loop_module
from spectune.training.distribution import World
from spectune.training.membership import membership
from tests.support import make_model, make_rows, make_tokenizer

SMALL = {PrefixTuning: {"num_virtual_tokens": 4}, PromptTuning: {"num_virtual_tokens": 4}}
CASES: dict[str, tuple[Method, dict[str, Any]]] = {
    **{cls.model_fields["name"].default: (cls(**SMALL.get(cls, {})), {}) for cls in METHODS},
    "adapter": (BottleneckAdapter(bottleneck_dim=8, dropout=0.0), {}),  # masks are each process's own
    "packed": (LoRA(r=2), {"packing": True}),
}
#: of each kind of module one, and what runs otherwise; the others are behind `-m slow`
FEW = ("full", "adapter", "prefix", "lora", "packed")
#: of 17 rows the third step has one, and a process none
ROWS, STEPS = make_rows(17), 6


def settings(batch: int, **changes: Any) -> TrainingConfig:
    given = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        **changes,
    }
    return TrainingConfig(**given)


def run(
    method: Method, config: TrainingConfig, rows: Any = None, **model: Any
) -> tuple[RunResult, dict[str, torch.Tensor]]:
    base = make_model(**model)
    given = ROWS if rows is None else rows
    result = train(base, make_tokenizer(), method, given, make_rows(7), config, console=Console(quiet=True))
    state = attached(base)["default"].training_state_dict()
    return result, {name: tensor.clone() for name, tensor in state.items()}


def interrupt_after(step: int) -> Any:
    """`Loop.finish`, with a Ctrl-C behind a step."""
    finish = loop_module.Loop.finish

    def interrupted(self: Any) -> float:
        loss = finish(self)
        if self.run.progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    return interrupted


def failure(work: Callable[[], object]) -> list[str]:
    try:
        work()
    except SpectuneError as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def does_not_fit(*_: object) -> None:
    raise DoesNotFitError("too large")


class Broken:
    """The objective, whose loss is no number in the third step, on one process alone: its rows are the others'."""

    def __init__(self, on: bool) -> None:
        self.on, self.calls = on, 0
        self.precompute = CAUSAL_LM.precompute

    def loss_sum(self, *given: Any, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, counts = CAUSAL_LM.loss_sum(*given, **how)
        self.calls += 1
        return loss * (float("nan") if self.on and self.calls > 4 else 1.0), counts


def trained(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    world, found = World(torch.device("cpu")), {}
    for name in names:
        method, changes = CASES[name]
        result, state = run(method, settings(2, output_dir=folder / name, **changes))
        found[name] = result.model_dump(mode="json")
        if world.leads:
            save_file(state, folder / f"{name}.safetensors")
    return found


def several(folder: Path) -> dict[str, Any]:
    world, found = World(torch.device("cpu")), trained(folder, FEW)
    found["other rows"] = failure(lambda: run(LoRA(), settings(2), ROWS[: 17 - world.rank]))

    check, finish = starting.check_memory, loop_module.Loop.finish
    starting.check_memory = check if world.leads else does_not_fit
    found["does not fit"] = failure(lambda: run(LoRA(), settings(2)))
    starting.check_memory = check

    objective_of, broken = loop_module.objective_of, Broken(world.leads)
    loop_module.objective_of = lambda _: broken
    found["diverged"] = failure(lambda: run(LoRA(), settings(2, output_dir=folder / "diverged")))
    loop_module.objective_of = objective_of

    loop_module.Loop.finish = finish if world.leads else interrupt_after(2)
    found["interrupted"] = failure(lambda: run(LoRA(), settings(2, output_dir=folder / "two")))
    torch.manual_seed(world.rank)  # what is drawn is not what a checkpoint holds
    dropped = settings(2, output_dir=folder / "dropout")
    found["interrupted again"] = failure(lambda: run(LoRA(), dropped, dropout=0.1))
    loop_module.Loop.finish = finish
    _, parts = run(LoRA(), dropped.model_copy(update={"resume": True}), dropout=0.1)
    _, whole = run(LoRA(), settings(2), dropout=0.1)
    found["dropout goes on"] = all(torch.equal(whole[name], tensor) for name, tensor in parts.items())

    _, state = run(LoRA(), settings(2, output_dir=folder / "one", resume=True))
    if world.leads:
        save_file(state, folder / "one.safetensors")
    found["batch that changes"] = failure(lambda: run(LoRA(), settings(1, output_dir=folder / "two", resume=True)))
    return found


def work(folder: str, cases: Sequence[str] = ()) -> None:
    warnings.simplefilter("error")
    place = Path(folder)
    first, _ = run(LoRA(), settings(2))  # meets and parts
    with membership():
        outcome = {"first": first.model_dump(mode="json"), **(trained(place, cases) if cases else several(place))}
        rank = os.environ["RANK"]
        (place / f"rank-{rank}.json").write_text(json.dumps(outcome))
        if not cases:
            sys.argv[1:] = ["train", "--data", str(place / f"rows-{rank}.jsonl"), "--device", "cpu"]
            sys.argv += ["--output-dir", str(place / "cli"), "--set", "max_steps=2"]
            main()


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2:])
