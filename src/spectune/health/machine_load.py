"""Cores, threads, what others take of them, and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from spectune.health.outcome import FAILED, NOT_HERE, OK, Outcome

#: a thread that computes has less of a core than this: others want it too
_SHARE = 0.85
#: runnable threads for each core, beyond what checks of ours that run side by side make by themselves
_OVERLOAD = 4.0
#: a small model and Python's libraries need so much
LEAST_MEMORY = 2**30


def cores(threads: int | None = None, usable: int | None = None) -> Outcome:
    """Threads that torch will use, beside the cores that this process may use."""
    usable = usable or usable_cores()
    wanted = os.environ.get("OMP_NUM_THREADS")
    threads = threads or int(wanted if wanted and wanted.isdigit() else usable)
    says = f"{usable} of {os.cpu_count()} cores usable, torch uses {threads} threads"
    if threads > usable:
        return Outcome(
            "cores", FAILED, says, f"Set OMP_NUM_THREADS={usable}: more threads than cores wait for each other"
        )
    if threads < usable // 2:
        return Outcome("cores", NOT_HERE, f"{says} (OMP_NUM_THREADS={wanted})", "Runs on the CPU leave cores idle")
    return Outcome("cores", OK, says)


def usable_cores() -> int:
    """Cores that this process may run on, and that its container lets it use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return allowed if quota == "max" else max(1, min(allowed, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return allowed


def share_of_a_core(seconds: float = 0.3) -> float:
    """What a thread that computes gets of a core, looked at for a moment."""
    wall, own = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        sum(range(1000))
    return (time.process_time() - own) / (time.perf_counter() - wall)


def busy(share: Callable[[], float] = share_of_a_core, load: float | None = None, usable: int | None = None) -> Outcome:
    """Whether others compute here: then timings are not this machine's."""
    got, usable = share(), usable or usable_cores()
    load = load if load is not None else _load()
    says = f"a thread gets {got:.0%} of a core, load {load:.1f} on {usable} cores"
    if got < _SHARE or load > 1.5 * usable:
        return Outcome(
            "quiet", NOT_HERE, f"others compute here: {says}", "Timings and speeds measured now are not to be relied on"
        )
    return Outcome("quiet", OK, says)


def is_overloaded(load: float | None = None, usable: int | None = None) -> bool:
    """Whether others want so much of the machine that what takes long here does not for a fault of its own."""
    return (load if load is not None else _load()) > _OVERLOAD * (usable or usable_cores())


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def memory(free: int | None, least: int = LEAST_MEMORY) -> Outcome:
    """What is left for this process, of the machine or of its container. `free`: bytes, None where nobody tells."""
    if free is None:
        return Outcome(
            "memory", NOT_HERE, "this system does not say what memory is free", "Plans on the CPU are not checked"
        )
    says = f"{free / 2**30:,.1f} GiB free for this process (of the machine, or of its container's limit)"
    if free < least:
        return Outcome(
            "memory",
            FAILED,
            says,
            f"Free some, or raise the limit: {least / 2**30:.0f} GiB is the least for a small model",
        )
    return Outcome("memory", OK, says)
