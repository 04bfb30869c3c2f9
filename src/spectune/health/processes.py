"""Whether processes of this machine can add up tensors: over NCCL between its GPUs, else over gloo."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from spectune.health.outcome import FAILED, NOT_HERE, OK, Outcome

#: of waiting for the others; a check that waits longer is ended from outside
SECONDS = 25
#: more GPUs take longer to begin than they tell
MOST = 8
NUMBERS = 2**22


def between_processes(start: Callable[[Sequence[str]], subprocess.Popen[str]] | None = None) -> Outcome:
    """Two processes, or one a GPU, add up tensors."""
    if not distributed.is_available():
        return Outcome("processes", NOT_HERE, "this torch has no torch.distributed", "torchrun cannot be used")
    gpus = torch.cuda.device_count()
    backend, count = ("nccl", min(gpus, MOST)) if gpus > 1 and distributed.is_nccl_available() else ("gloo", 2)
    with tempfile.TemporaryDirectory() as folder:
        running = [(start or _start)(["rank", str(rank), str(count), backend, folder]) for rank in range(count)]
        try:
            ended = [process.communicate(timeout=SECONDS + 5) for process in running]
        except subprocess.TimeoutExpired:
            return _failed(backend, f"{count} processes did not find each other in {SECONDS} s")
        finally:
            for process in running:
                process.kill()
                process.communicate()
    for rank, (process, (_, errors)) in enumerate(zip(running, ended, strict=True)):
        if process.returncode != 0:
            last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no word")
            return _failed(backend, f"process {rank} of {count}: {last.strip()}")
    seconds = float(ended[0][0].split()[-1])
    rate = NUMBERS * 4 / seconds / 1e9
    what = f"{count} GPUs over NCCL" if backend == "nccl" else f"{count} processes over gloo"
    return Outcome("processes", OK, f"{what} add up {NUMBERS * 4 / 1e6:.0f} MB at {rate:.1f} GB/s")


def _failed(backend: str, says: str) -> Outcome:
    advice = (
        "Run again with NCCL_DEBUG=INFO, which names what it cannot reach; NCCL_P2P_DISABLE=1 goes without peer access"
        if backend == "nccl"
        else "Set GLOO_SOCKET_IFNAME to a network interface of this machine, such as lo"
    )
    return Outcome("processes", FAILED, f"{backend}: {says}", advice)


def _start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "spectune.health.child", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def one_of(rank: int, count: int, backend: str, folder: str) -> None:
    """One of the processes. Prints the seconds that a sum took. Raises RuntimeError where a sum is wrong."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend, init_method=Path(folder, "store").as_uri(), rank=rank, world_size=count,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    try:
        for _ in range(2):  # the first one makes connections
            tensor = torch.full((NUMBERS,), float(rank + 1), device=device)
            distributed.barrier()
            began = time.perf_counter()
            distributed.all_reduce(tensor)
            total = float(tensor[-1])
            seconds = time.perf_counter() - began
            if total != count * (count + 1) / 2:
                raise RuntimeError(f"the sum of 1 to {count} came out as {total}")
    finally:
        distributed.destroy_process_group()
    sys.stdout.write(f"{seconds}\n")
