"""A fast path: `spectune.train`, whose first steps are held at given weights."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import torch
from benchmarks.parity.compared import EARLY, Near, near
from benchmarks.parity.paths import Path
from benchmarks.parity.plain import At, State
from benchmarks.parity.task import Task
from benchmarks.step_speed.meter import compilations
from rich.console import Console
from torch import Tensor

import spectune
from spectune.compute.frozen import FrozenLinear
from spectune.deltas import Delta

#: called with the number of a held step and the gradients there
Judge = Callable[[int, Mapping[str, Tensor]], None]


class Holding:
    """In an optimizer's place: in the first steps it takes the gradients and writes the weights of the next state in
    place of a step; then those of the first state, and from there on it is the optimizer that the run asked for."""

    def __init__(self, delta: Delta, states: Sequence[State], judge: Judge, make: Callable[[], Any]) -> None:
        self.delta, self.states, self.judge, self.make = delta, states, judge, make
        self.inner: Any = None
        self.held = self.peak = 0

    def begin(self, rate: float) -> None:
        if self.inner is not None:
            self.inner.begin(rate)

    def step(self, rate: float, max_grad_norm: float, loss: Tensor) -> Tensor:
        if self.inner is not None:
            norm: Tensor = self.inner.step(rate, max_grad_norm, loss)
            if torch.cuda.is_available():
                self.peak = torch.cuda.max_memory_allocated()
            return norm
        self.judge(self.held, {n: p.grad for n, p in self.delta.named_parameters() if p.grad is not None})
        self.clear()
        self.held += 1
        over = self.held == len(self.states)
        self.delta.load_training_state_dict(self.states[0 if over else self.held])
        if over:
            self.inner = self.make()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        return torch.zeros(())

    def clear(self) -> None:
        for _, parameter in self.delta.named_parameters():
            parameter.grad = None

    def tensors(self) -> list[Tensor]:
        return [] if self.inner is None else list(self.inner.tensors())

    def close(self) -> None:
        if self.inner is not None:
            self.inner.close()

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.inner is None else dict(self.inner.state_dict())


@dataclass
class Run:
    """What a path's run gave.

    Attributes:
        held_losses, free_losses: nats a token, of each step.
        near: the gradients of the held steps to those of the plain loop in float64.
        near_decoded: the same to the plain loop over the weights that a quantised base stands for; else empty.
        steps_per_second: of the free steps but the first ones; None where there are no others.
        peak: bytes that CUDA's allocator held for tensors in the free steps.
        graphs: that torch.compile made.
    """

    held_losses: list[float]
    free_losses: list[float]
    valid: float
    near: list[Near]
    near_decoded: list[Near]
    steps_per_second: float | None
    peak: int | None
    graphs: int


@dataclass
class Decoded:
    """Fills `truth` with the plain loop's gradients over decoded weights, once they are known."""

    of: Callable[[Mapping[str, Tensor]], list[At]]
    truth: list[At] = field(default_factory=list)

    def learn(self, model: Any) -> None:
        named = model.named_modules()
        self.truth = self.of({path: m.dequantised().cpu() for path, m in named if isinstance(m, FrozenLinear)})


def run(task: Task, path: Path, states: Sequence[State], truth: Sequence[At], decoded: Decoded) -> Run:
    """Raises what `spectune.train` raises."""
    dtype = path.dtype_on(task.order.device)
    model = task.load(dtype, precision=path.precision)
    if path.precision is not None:
        decoded.learn(model)
    delta = task.attach(model)
    # a prefix begins with keys and values of the base, which another precision makes another way
    delta.load_training_state_dict(states[0])
    found: tuple[list[Near], list[Near]] = ([], [])
    before = compilations()

    def judge(step: int, gradients: Mapping[str, Tensor]) -> None:
        found[0].append(near(gradients, truth[step].gradient))
        if decoded.truth:
            found[1].append(near(gradients, decoded.truth[step].gradient))

    with tempfile.TemporaryDirectory() as folder, held(delta, states, judge) as holding:
        config = task.config(**path.settings, output_dir=File(folder) / "run")
        result = spectune.train(
            model,
            task.tokenizer,
            delta,
            task.train,
            task.valid,
            config,
            console=Console(quiet=True),
            base_valid_loss=0.0,
        )
        lines = [json.loads(x) for x in (File(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    losses = [line["loss"] for line in steps]
    seconds = [line["seconds"] for line in steps][task.order.held_steps + EARLY - 1 :]
    count = len(seconds) - 1
    assert result.last_valid_loss is not None
    assert len(losses) == task.total
    if path.settings.get("torch_compile") and compilations() == before:
        raise RuntimeError("torch.compile made no graph")
    return Run(
        losses[: task.order.held_steps],
        losses[task.order.held_steps :],
        result.last_valid_loss,
        *found,
        count / (seconds[-1] - seconds[0]) if count > 0 else None,
        holding[0].peak or None,
        compilations() - before,
    )


@contextmanager
def held(delta: Delta, states: Sequence[State], judge: Judge) -> Iterator[list[Holding]]:
    """Inside, `spectune.train` steps with a `Holding`, which is then in the list."""
    module: Any = importlib.import_module("spectune.training.run_state")
    make, made = module.make_optimizer, list[Holding]()

    def holding(*args: Any) -> Holding:
        made.append(Holding(delta, states, judge, lambda: make(*args)))
        return made[0]

    module.make_optimizer = holding
    try:
        yield made
    finally:
        module.make_optimizer = make
