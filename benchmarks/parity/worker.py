"""Runs of one method in this process, one after another."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path as File
from typing import Any

import torch
from benchmarks.parity import compared, fast, plain
from benchmarks.parity.paths import PATHS, Path
from benchmarks.parity.task import Order, Task, method_of
from pydantic import ValidationError
from torch import Tensor

from spectune.errors import ConfigError
from spectune.training.machine import environment

PLAIN, PLAIN_BF16 = "plain", "plain-bf16"
#: plain runs that differ from the plain loop of their dtype in rounding alone
CONTROLS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain-last-bit": (torch.float32, {"last_bit": True}),
    "plain-attention": (torch.float32, {"attention": "eager"}),
    "plain-bf16-last-bit": (torch.bfloat16, {"last_bit": True}),
}


class References:
    """The plain loop's runs, each made when it is first asked for."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._runs: dict[tuple[torch.dtype, float], plain.Free] = {}

    def free(self, dtype: torch.dtype, clip: float) -> plain.Free:
        if (dtype, clip) not in self._runs:
            self._runs[dtype, clip] = plain.free_run(self.task, dtype, clip=clip)
        return self._runs[dtype, clip]

    @property
    def states(self) -> list[plain.State]:
        """Weights that the plain float32 loop passed through."""
        return self.free(torch.float32, 1.0).states

    @cached_property
    def truth(self) -> list[plain.At]:
        return plain.at_states(self.task, torch.float64, self.states)

    def decoded(self, weights: Mapping[str, Tensor]) -> list[plain.At]:
        return plain.at_states(self.task, torch.float64, self.states, weights)

    def own_held(self, dtype: torch.dtype) -> dict[str, Any]:
        """The plain loop's own errors at given weights."""
        found = plain.at_states(self.task, dtype, self.states)
        gradients = [compared.near(a.gradient, b.gradient) for a, b in zip(found, self.truth, strict=True)]
        return compared.held_steps([a.loss for a in found], gradients, [t.loss for t in self.truth])


def measure(references: References, name: str) -> dict[str, Any]:
    """What a line has of one run."""
    task = references.task
    if name in (PLAIN, PLAIN_BF16):
        dtype = torch.float32 if name == PLAIN else torch.bfloat16
        run, exact = references.free(dtype, 1.0), references.free(torch.float32, 1.0)
        apart = compared.free_steps(run.losses, run.valid, exact.losses, exact.valid)
        return {"losses": run.losses, "valid_loss": run.valid, "held": references.own_held(dtype), "free": apart}
    if name in CONTROLS:
        dtype, settings = CONTROLS[name]
        run, exact = plain.free_run(task, dtype, clip=1.0, **settings), references.free(dtype, 1.0)
        apart = compared.free_steps(run.losses, run.valid, exact.losses, exact.valid)
        return {"losses": run.losses, "valid_loss": run.valid, "free": apart}
    return _path(references, PATHS[name])


def _path(references: References, path: Path) -> dict[str, Any]:
    task = references.task
    truth = [at.loss for at in references.truth]
    decoded = fast.Decoded(references.decoded)
    run = fast.run(task, path, references.states, references.truth, decoded)
    other = references.free(path.dtype_on(task.order.device), path.clip)
    line: dict[str, Any] = {
        "dtype": str(path.dtype_on(task.order.device)).removeprefix("torch."),
        "losses": run.free_losses,
        "valid_loss": run.valid,
        "held": compared.held_steps(run.held_losses, run.near, truth),
        "free": compared.free_steps(run.free_losses, run.valid, other.losses, other.valid),
        "steps_per_second": run.steps_per_second,
        "peak_allocated": run.peak,
        "graphs": run.graphs,
    }
    if run.near_decoded:
        losses = [at.loss for at in decoded.truth]
        line["held_decoded"] = compared.held_steps(run.held_losses, run.near_decoded, losses)
    return line


def main(told: dict[str, Any]) -> None:
    """Measure `told["runs"]` in their order and append a line for each to `told["out"]`.

    Before a run its name goes into `told["now"]`: where the process dies, that is what it died of. After an error of
    the device nothing in this process can be trusted: it ends, and the driver begins another.
    """
    order = Order(**told["order"])
    torch.backends.cuda.matmul.allow_tf32 = False  # the default, and what "float32" means here
    references = References(Task(order, method_of(told["method"])))
    common = {"method": told["method"], **asdict(order), "base": File(order.base).name, "data": File(order.data).name}
    common |= {"device": compared.device_name(order.device), "workers": told["workers"], "environment": environment()}
    for name in told["runs"]:
        if time.time() > told["until"]:
            return
        File(told["now"]).write_text(name, encoding="utf-8")
        begin = time.time()
        device_lost = False
        try:
            found = measure(references, name)
        except (ConfigError, ValidationError) as error:
            found = {"refused": str(error)[:500]}
        except Exception as error:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}".strip()[:800]}
            device_lost = "CUDA error" in str(error)
        line = {"path": name, **common, **found, "seconds": time.time() - begin}
        with File(told["out"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        File(told["now"]).unlink()
        gc.collect()  # models hold themselves: the next run's memory is its own
        print(said(line), flush=True)
        if device_lost:
            raise SystemExit(3)


def said(line: dict[str, Any]) -> str:
    head = f"{line['method']:<8} {line['path']:<24}"
    if "free" not in line:
        return f"{head} {line.get('refused') or line['failed']}"
    held, free = line.get("held"), line["free"]
    at = (
        f"held: loss {held['loss']:.1e}, gradient {held['error']:.1e}, cosine {held['least_cosine']:.6f}; "
        if held
        else ""
    )
    return (
        f"{head} {at}free: {free['early']:.1e} early, {free['largest']:.1e}, mean {free['mean']:.1e}, "
        f"valid {free['valid']:+.1e}; {line['seconds']:.0f} s"
    )
