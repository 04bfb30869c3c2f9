"""A process for each type, forked from one that has everything imported: a crash or a hang costs one type alone."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import time
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.coverage.bases import BaseFailsError, measure
from benchmarks.coverage.checks import METHODS, check

BASE_FAILS, CRASHED = "base fails", "defect"
_FORK = multiprocessing.get_context("fork")


@dataclasses.dataclass
class Job:
    model_type: str
    methods: list[str]
    process: Any
    receiver: Connection
    begin: float
    done: list[str]


def run(types: list[str], methods: list[str], jobs: int, out: Path, seconds: float) -> None:
    """Append a line to `out` for each type and method that has none of these versions there yet."""
    done = {(r["type"], r["method"]) for r in read(out)}
    wanted = [(t, [m for m in methods if (t, m) not in done]) for t in types]
    todo = [(t, left) for t, left in wanted if left]
    running: list[Job] = []
    while todo or running:
        while todo and len(running) < jobs:
            running.append(_start(*todo.pop(0)))
        wait([job.receiver for job in running], timeout=1.0)
        for job in list(running):
            if _collect(job, out, seconds):
                running.remove(job)


def read(out: Path) -> list[dict[str, Any]]:
    """The results in a file, the newest of each type and method, of the versions that are installed."""
    if not out.exists():
        return []
    rows = [json.loads(line) for line in out.read_text().splitlines() if line.strip()]
    return list({(r["type"], r["method"]): r for r in rows if r["versions"] == versions()}.values())


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _start(model_type: str, methods: list[str]) -> Job:
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_work, args=(model_type, methods, sender), daemon=True)
    process.start()
    sender.close()
    return Job(model_type, methods, process, receiver, time.perf_counter(), [])


def _collect(job: Job, out: Path, seconds: float) -> bool:
    """Write what a process has found; True once it is over."""
    over = False
    while job.receiver.poll():
        try:
            row = job.receiver.recv()
        except EOFError:
            over = True
            break
        _write(out, row)
        job.done.append(row["method"])
    late = time.perf_counter() - job.begin > seconds
    if not over and not late:
        return False
    if late:
        job.process.kill()
    job.process.join()
    for method in job.methods:
        if method not in job.done:
            why = f"no answer within {seconds:g} s" if late else f"the process died (exit code {job.process.exitcode})"
            _write(out, _row(job.model_type, method, status=CRASHED, problems=[why]))
    return True


def _work(model_type: str, methods: list[str], sender: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("spectune").setLevel(logging.INFO)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    os.dup2(silent, 1)
    try:
        bare = measure(model_type)
    except BaseFailsError as error:
        for method in methods:
            sender.send(_row(model_type, method, status=BASE_FAILS, reason=str(error)))
        return
    for method in methods:
        begin = time.perf_counter()
        found = dataclasses.asdict(check(model_type, method, bare))
        found["numbers"]["seconds"] = round(time.perf_counter() - begin, 2)
        sender.send(_row(model_type, method, **found, base=dataclasses.asdict(bare)))


def _row(model_type: str, method: str, **found: Any) -> dict[str, Any]:
    assert method in METHODS
    return {"type": model_type, "method": method, "versions": versions(), **found}


def _write(out: Path, row: dict[str, Any]) -> None:
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    problems = "; ".join(row.get("problems", [])) or " ".join(row.get("reason", "").split())
    print(f"{row['type']:28s} {row['method']:8s} {row['status']:8s} {problems[:200]}", flush=True)
