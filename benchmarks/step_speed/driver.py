"""Starts one process a measurement, repeats interleaved, until all are done or the budget is used up."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.step_speed.grid import Case

ROOT = Path(__file__).parents[2]
#: what nvidia-smi is asked for while a process runs, and in which unit it answers
QUERY = ("clocks.sm", "power.draw", "temperature.gpu")


@dataclass
class Plan:
    """How the cases are measured.

    Attributes:
        out: JSON lines, appended to; beside it, `.log` has what the processes said.
        budget: seconds after which nothing new is started; None for no end.
        timeout: seconds that one process may take.
        peak_tflops: of the device, 10^12 bf16 operations a second; None where nobody knows.
        allocator: PYTORCH_ALLOC_CONF of every process: some peers would set their own.
    """

    out: Path
    device: str
    repeats: int
    warmup: int
    steps: int
    budget: float | None
    timeout: float
    peak_tflops: float | None
    allocator: str
    rows: int | None = None
    lost: set[Case] = field(default_factory=set)

    def run(self, cases: list[Case]) -> int:
        """Measure all cases once, then all again. What failed is not tried again. Returns how many were left out."""
        begin = time.perf_counter()
        jobs = [(case, repeat) for repeat in range(self.repeats) for case in cases]
        for number, (case, repeat) in enumerate(jobs):
            if self.budget is not None and time.perf_counter() - begin > self.budget:
                left = len({c for c, r in jobs[number:] if r == 0})
                print(f"budget of {self.budget:g} s used up: {left} of {len(cases)} cases never measured", flush=True)
                return left
            if case not in self.lost:
                self.one(case, repeat)
        return 0

    def one(self, case: Case, repeat: int) -> None:
        begin = time.time()
        line = {**case.to_dict(), "repeat": repeat, **self._process(case)}
        line |= {"peak_tflops": self.peak_tflops, "allocator": self.allocator, "at": begin}
        line["process_seconds"] = time.time() - begin
        if "tokens_per_second" not in line:
            self.lost.add(case)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(said(line), flush=True)

    def _process(self, case: Case) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, Watch(self.device) as watch:
            result = Path(folder) / "line.json"
            order = {**case.to_dict(), "device": self.device, "warmup": self.warmup, "steps": self.steps,
                     "rows": self.rows, "result": str(result)}  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.step_speed", "--worker", json.dumps(order)]
            with self.out.with_suffix(".log").open("a", encoding="utf-8") as log:
                log.write(f"\n== {case}\n")
                log.flush()
                # some peers write caches where they run: not into the source tree
                process = subprocess.Popen(
                    command, cwd=folder, env=self._environment(), stdout=log, stderr=log, start_new_session=True
                )
                try:
                    code = process.wait(self.timeout)
                except BaseException as error:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    if not isinstance(error, subprocess.TimeoutExpired):
                        raise
                    return {"failed": f"not done after {self.timeout:g} s"}
            if not result.exists():
                return {"failed": f"the process ended with {code}, see {self.out.with_suffix('.log').name}"}
            line: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return {**line, **watch.between(line.get("timed_from"), line.get("timed_to"))}

    def _environment(self) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTORCH_ALLOC_CONF": self.allocator,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "UNSLOTH_DISABLE_STATISTICS": "1",
        }


class Watch:
    """Reads clocks and power twice a second with nvidia-smi, where there is one."""

    def __init__(self, device: str) -> None:
        self.wanted = device == "cuda"
        self.process: subprocess.Popen[str] | None = None
        self.samples: list[tuple[float, list[float]]] = []

    def __enter__(self) -> Watch:
        if self.wanted:
            command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", "-lms", "500"]
            if (gpus := os.environ.get("CUDA_VISIBLE_DEVICES", "")).isdecimal():
                command += ["--id", gpus]  # of several, the one that measures
            try:
                self.process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
                )
            except OSError as error:
                print(f"clocks and power are not logged: {error}", flush=True)
                return self
            threading.Thread(target=self._read, args=(self.process,), daemon=True).start()
        return self

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                self.samples.append((time.time(), [float(value) for value in line.split(",")]))
            except ValueError:  # "[N/A]", or a second device's line cut short
                continue

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def between(self, begin: float | None, end: float | None) -> dict[str, Any]:
        """Medians of what was read in the timed stretch."""
        if begin is None or end is None:
            return {}
        inside = [values for at, values in self.samples if begin <= at <= end and len(values) == len(QUERY)]
        if not inside:
            return {}
        clocks, power, temperature = (statistics.median(column) for column in zip(*inside, strict=True))
        return {"sm_clock_mhz": clocks, "power_watts": power, "temperature_celsius": temperature}


def said(line: dict[str, Any]) -> str:
    """One line for the terminal."""
    head = f"{line['shape']:<18} {line['method']:<8} {line['system']:<26} #{line['repeat']}"
    if "tokens_per_second" not in line:
        return f"{head}  {line.get('refused') or line['failed']}"
    memory = line.get("peak_allocated", line.get("peak_resident", 0)) / 2**30
    share = ""
    if line["peak_tflops"] and "flops_per_token" in line:
        share = f" {line['tokens_per_second'] * line['flops_per_token'] / line['peak_tflops'] / 1e12:5.2f} of limit"
    return (
        f"{head} {line['tokens_per_second']:10,.0f} tokens/s{share} {memory:6.2f} GiB, compile "
        f"{line['compile_seconds']:.1f} s, process {line['process_seconds']:.0f} s, loss {line['losses'][0]:.4f} -> "
        f"{line['losses'][-1]:.4f}" + ("" if line["settled"] else ", STILL COMPILING")
    )
