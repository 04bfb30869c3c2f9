"""Versions and machine, recorded with each result; and what else the machine does while something is timed."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from spectune.results.other_work import MachineLoad
from spectune.version import __version__, installed_version

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "datasets", "numpy")


def environment() -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement."""
    return {
        "spectune": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := installed_version(name)) is not None},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True)
class Gauges:
    """What a machine says of its load.

    Attributes:
        wall: seconds from some point on.
        cpu: seconds that the working thread has run: the one that asks; on CUDA the whole process, whose threads take
            turns.
        load_average: of the last minute; None where the system has none.
        cores: of the machine.
    """

    wall: Callable[[], float]
    cpu: Callable[[], float]
    load_average: Callable[[], float | None]
    cores: int | None

    @classmethod
    def of(cls, device_type: str) -> "Gauges":
        """This machine's, for work on such a device."""
        cpu = time.process_time if device_type == "cuda" else time.thread_time
        return cls(time.perf_counter, cpu, _load_average, os.cpu_count())


class Watch:
    """What else the machine does from here on, beside the work of this thread."""

    def __init__(self, device_type: str, gauges: Gauges | None = None) -> None:
        self._gauges = gauges or Gauges.of(device_type)
        self._wall, self._cpu = self._gauges.wall(), self._gauges.cpu()

    def seen(self) -> MachineLoad:
        """What was seen up to now."""
        gauges = self._gauges
        return load_of(gauges.wall() - self._wall, gauges.cpu() - self._cpu, gauges)


def load_of(wall: float, cpu: float, gauges: Gauges) -> MachineLoad:
    """Of work that took so many seconds, and so many of the CPU."""
    share = min(1.0, cpu / wall) if wall > 0 else None
    return MachineLoad(ran_share=share, load_average=gauges.load_average(), cores=gauges.cores)


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
