"""The clock of a measurement: warm-up until nothing is compiled any more, then steps between two synchronises."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectune.compute.memory import graph_pool_bytes

#: losses kept for the check that systems compute the same
LOSSES = 20


@dataclass
class Meter:
    """Call `begin` before the first step and `step` after each; it returns whether to stop.

    Attributes:
        warmup: steps before the clock at least; `steady` of them, in a row, must have compiled nothing.
        most: the clock starts after so many at the latest, and the result says that compiling had not ended.
        steps: steps timed.
    """

    device: torch.device
    tokens: int
    warmup: int = 10
    steps: int = 30
    steady: int = 5
    most: int = 60
    losses: list[Tensor | float] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> None:
        self._seconds: list[float] = []
        self._compiled = [compilations()]
        self._timed = self._tokens = self._targets = 0
        self._timing = False
        self._mark = self._now()

    def step(self, loss: Tensor | float | None, tokens: int | None = None, targets: int | None = None) -> bool:
        """`tokens` of this step, where they differ from step to step, and how many of them had a loss. `loss` is of
        this step or the one before; None: none is known yet."""
        if loss is not None and len(self.losses) < LOSSES:
            self.losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        if self._timing:
            self._timed += 1
            self._tokens += self.tokens if tokens is None else tokens
            self._targets += targets or 0
            if self._timed == self.steps:
                self._finish()
            return self._timed == self.steps
        now = self._now()
        self._seconds.append(now - self._mark)
        self._compiled.append(compilations())
        if self._warm() or len(self._seconds) >= self.most:
            self._start()
        else:
            self._mark = now
        return False

    def _warm(self) -> bool:
        last = self._compiled[-self.steady - 1 :]
        return len(self._seconds) >= max(self.warmup, self.steady) and len(set(last)) == 1

    def _start(self) -> None:
        self.found |= {
            "warmup_steps": len(self._seconds),
            "warmup_seconds": sum(self._seconds),
            "settled": self._warm(),
            "graphs": self._compiled[-1] - self._compiled[0],
        }
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._timing = True
        self.found["timed_from"] = time.time()
        self._mark = self._now()

    def _finish(self) -> None:
        seconds = self._now() - self._mark
        each = seconds / self.steps
        self.found |= {
            "timed_to": time.time(),
            "steps": self.steps,
            "step_seconds": each,
            "tokens_per_second": self._tokens / seconds,
            # what the warm-up took beyond so many steps at full speed: compiling, loading kernels, tuning them
            "compile_seconds": max(0.0, self.found["warmup_seconds"] - self.found["warmup_steps"] * each),
            "recompiled_while_timed": compilations() - self._compiled[-1],
            "losses": [float(loss) for loss in self.losses],
            **({"targets_per_second": self._targets / seconds} if self._targets else {}),
            **self._memory(),
        }

    def _memory(self) -> dict[str, int]:
        if self.device.type != "cuda":
            # the whole process, from its start: a CPU's allocator keeps no peak that could be set back
            return {"peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        free, total = torch.cuda.mem_get_info()
        recorded = graph_pool_bytes(self.device)
        return {
            "peak_allocated": torch.cuda.max_memory_allocated() + recorded,
            "recorded_bytes": recorded,
            "peak_reserved": torch.cuda.max_memory_reserved(),
            "device_used": total - free,
        }

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def compilations() -> int:
    """Graphs that torch.compile has made in this process, or tried to."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"] + counters["frames"]["total"]
