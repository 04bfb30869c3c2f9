"""Two processes a method, some of all at a time; one that dies is begun again without the run that it died of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path as File
from queue import Queue
from typing import Any

import torch
from benchmarks.parity.paths import PATHS
from benchmarks.parity.task import Order

ROOT = File(__file__).parents[2]
#: what others are held against, made first
FIRST = ("plain", "plain-attention", "plain-bf16")
#: a second control, for the smallest change there is: with the method that most train with, and with all weights; in
#: bfloat16 with all methods
LAST_BIT = ("lora", "full")


def runs_of(method: str, device: str, paths: list[str]) -> list[str]:
    """All runs of one method, in the order in which they are made. `paths`: only these, beside what they need."""
    chosen = [n for n, p in PATHS.items() if method in p.methods and device in p.devices and (not paths or n in paths)]
    low = any(PATHS[name].dtype_on(device) == torch.bfloat16 for name in chosen)
    controls = ["plain-last-bit"] if method in LAST_BIT else []
    ordered = sorted(chosen, key=lambda name: PATHS[name].tier)  # stable
    first = [name for name in FIRST if name != "plain-bf16" or low]
    if any(PATHS[name].kind == "rounding" for name in chosen):
        controls.append("plain-bf16-last-bit")
    return sorted([*first, *controls, *ordered], key=late)


def jobs(todo: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Runs for one process each: a method's first ones, and its later ones, which make the plain runs once more."""
    parts = {method: ([r for r in runs if not late(r)], [r for r in runs if late(r)]) for method, runs in todo.items()}
    found = [(method, part[number]) for number in (0, 1) for method, part in parts.items()]
    return [(method, runs) for method, runs in found if runs]


def late(run: str) -> bool:
    return run.endswith("last-bit") or (run in PATHS and PATHS[run].tier > 0)


@dataclass
class Plan:
    """What one call does.

    Attributes:
        until: seconds of `time.time()` after which no run is started.
        gpus: workers take turns among so many.
    """

    out: File
    order: Order
    workers: int
    gpus: int
    until: float

    def run(self, todo: dict[str, list[str]]) -> None:
        places: Queue[int] = Queue()
        for number in range(self.workers):
            places.put(number % self.gpus)

        def one(job: tuple[str, list[str]]) -> None:
            place = places.get()
            try:
                self._job(*job, place)
            finally:
                places.put(place)

        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(one, jobs(todo)))

    def _job(self, method: str, runs: list[str], gpu: int) -> None:
        """Until all are done, failed ones included. A process that ends before it began a run is not begun again."""
        while runs and time.time() < self.until:
            size = self.out.stat().st_size if self.out.is_file() else 0
            if self._process(method, runs, gpu):
                return
            with self.out.open(encoding="utf-8") as file:
                file.seek(size)
                lines = [json.loads(line) for line in file]
            new = {line["path"] for line in lines if line["method"] == method}
            if not new & set(runs):
                print(f"{method}: no run of {', '.join(runs)}; see {self.out.with_suffix('.log').name}", flush=True)
                return
            runs = [name for name in runs if name not in new]

    def _process(self, method: str, runs: list[str], gpu: int) -> bool:
        """Whether it came to its end. The run that it died of gets a line."""
        with tempfile.TemporaryDirectory() as folder:
            now = File(folder) / "now"
            told = {"method": method, "runs": runs, "order": asdict(self.order), "until": self.until, "now": str(now),
                    "out": str(self.out), "workers": self.workers}  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.parity", "--worker", json.dumps(told)]
            with self.out.with_suffix(".log").open("a", encoding="utf-8") as log:
                code = subprocess.run(command, env=self._environment(gpu), stderr=log, check=False).returncode
            self.out.touch()
            if code == 0 or not now.exists():
                return code == 0
            died = now.read_text(encoding="utf-8")
        line = {"path": died, "method": method, **asdict(self.order), "device": self.order.device,
                "failed": f"the process ended with {code}, see {self.out.with_suffix('.log').name}"}  # fmt: skip
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{method:<8} {died:<24} {line['failed']}", flush=True)
        return False

    def _environment(self, gpu: int) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            # processes beside each other do not start a thread for every core each
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // self.workers)),
            **({"CUDA_VISIBLE_DEVICES": str(gpu)} if self.gpus > 1 else {}),
        }


def read(out: File) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.is_file() else []
