"""How much memory a device has, and how much of it is free."""

from pathlib import Path

import torch

from spectune.torchrun import Place


def free_memory(
    device: torch.device | str, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes that this process could still take, what its allocator holds unused included; None where nobody tells.

    CUDA: what the driver calls free, and torch's cache. CPU: `MemAvailable` of Linux, or what is left of the
    container's limit; of processes that torchrun started on this machine each one's part.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    known = [size for size in (_available(proc), _left_of_limit(cgroup)) if size is not None]
    shared = Place.from_environment().local_size
    return min((size // shared for size in known), default=None)


def _available(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_of_limit(cgroup: Path) -> int | None:
    """Of cgroup v2's `memory.max`; files in the cache are given back when memory is asked for."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("file", 0)))
