"""Peak memory as it was, in bytes: what was allocated for tensors, and what the process or the device held.

On CUDA both come from torch's allocator. A CPU has none that counts, so tensors are counted here, one by one, as
they are made and freed (exact and repeatable), and the resident set is the operating system's.
"""

import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectune.compute import allocator_settings

#: What backward does in place where nobody looks on, and out of place under a dispatch mode, which it takes for tensors
#: that know no operation in place (torch/csrc/autograd/FunctionsManual.cpp: areAnyTensorSubclassLike): the gradients of
#: indexing, gather and index_select, added into zeros made for them.
_aten = torch.ops.aten
ADDED_IN_PLACE = (_aten.index_put.default, _aten.scatter_add.default, _aten.index_add.default)


def counts_tensors(device_type: str) -> bool:
    """Whether memory on such a device is measured by counting tensors one by one: CUDA's allocator keeps its peak at no
    cost, elsewhere there is none that does."""
    return device_type != "cuda"


def added_in_place(func: Any) -> bool:
    """Whether an operation that a dispatch mode sees would have been in place on its first argument without the mode:
    then its result takes no memory. In backward itself only, not in what is recomputed there."""
    in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
    return in_backward and func in ADDED_IN_PLACE


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live tensors inside its `with`, forward and backward, and keeps the peak.

    A tensor's memory is counted once however many views it has, from the moment an operation makes it (or first
    reads it, if it was there before) until the last tensor that shares it is gone. Deterministic: the same step gives
    the same number. Not counted: what a kernel takes and gives back inside one operation (scratch space), and what
    compiled code allocates for itself.

    Args:
        baseline: tensors that are there from the start: weights, gradients, optimizer state, the batch.
        device_type: only tensors of this kind of device are counted.
    """

    def __init__(self, baseline: Iterable[Tensor] = (), device_type: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.live_bytes = 0
        self.peak_bytes = 0
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        for tensor in baseline:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's memory as live, unless it is counted already."""
        if tensor.device.type != self.device_type or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is not None and known[1] == size:
            return
        if known is not None:  # grown in place
            self.live_bytes -= known[1]
        self._live[key] = (known[0] if known is not None else weakref.ref(storage, self._freed(key)), size)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor's memory no longer."""
        known = self._live.pop(tensor.untyped_storage()._cdata, None)
        if known is not None:
            self.live_bytes -= known[1]

    def _freed(self, key: int) -> Callable[[Any], None]:
        tracker = weakref.ref(self)

        def callback(_: Any) -> None:
            alive = tracker()
            if alive is not None and key in alive._live:
                alive.live_bytes -= alive._live.pop(key)[1]

        return callback

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._add_all((args, kwargs))
        result = func(*args, **kwargs)
        if added_in_place(func):
            self.forget(args[0])
        self._add_all(result)
        return result

    def _add_all(self, tree: Any) -> None:
        # by hand: torch's walk through any tree takes longer than many of the operations themselves
        if isinstance(tree, Tensor):
            self.add(tree)
        elif isinstance(tree, (tuple, list)):
            for part in tree:
                self._add_all(part)
        elif isinstance(tree, dict):
            for part in tree.values():
                self._add_all(part)


class PeakMemory:
    """Measures the peak of memory inside a `with`; `.result` is filled when it ends, also by an exception.

    ```python
    with PeakMemory(device, baseline=model.parameters()) as peak:
        step()
    peak.result  # {"allocated": 123456, "resident": 456789012} on a CPU
    ```
    Keys, all in bytes:
        allocated: tensors. CUDA: of the whole process, by torch's allocator. Elsewhere: see `AllocationTracker`; left
            out with `count_tensors=False`.
        reserved: CUDA: what torch's allocator held of the device. MPS: what the driver held when the block ended.
        resident: CPU: physical memory of the process (Python and libraries included), peak inside the block.
        resident_since_start: where the system only knows the peak since the process began (macOS).

    Counting tensors costs a few microseconds for each operation, in which a small model's step can become several
    times slower: measure a few steps this way, and speed in others. Blocks must not be nested.

    Args:
        device: where the work runs.
        baseline: tensors that are there from the start (see `AllocationTracker`); not needed on CUDA.
        count_tensors: False leaves the operations alone, and "allocated" out, everywhere but on CUDA.
    """

    def __init__(
        self, device: torch.device | str, *, baseline: Iterable[Tensor] = (), count_tensors: bool = True
    ) -> None:
        self.device = torch.device(device)
        self.result: dict[str, int] = {}
        self._tracker: AllocationTracker | None = None
        if count_tensors and counts_tensors(self.device.type):
            self._tracker = AllocationTracker(baseline, self.device.type)
        self._resident = ResidentPeak() if self.device.type == "cpu" else None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        for watch in (self._resident, self._tracker):
            self._stack.enter_context(watch or contextlib.nullcontext())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.result["allocated"] = int(torch.cuda.max_memory_allocated(self.device)) + graph_pool_bytes(self.device)
            self.result["reserved"] = int(torch.cuda.max_memory_reserved(self.device))
        if self._tracker is not None:
            self.result["allocated"] = self._tracker.peak_bytes
        if self.device.type == "mps":
            # Metal keeps no peak; its driver gives memory back only when it must, so what it holds is close to one
            self.result["reserved"] = int(torch.mps.driver_allocated_memory())
        if self._resident is not None:
            self.result.update(self._resident.result)


def release_workspaces() -> None:
    """Free what cuBLAS has for scratch: torch keeps it for each stream and thread that multiplied, for good. Where
    there is need of it, it is made anew."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch._C._cuda_clearCublasWorkspaces()


@contextlib.contextmanager
def leaving_nothing(device: torch.device) -> Iterator[None]:
    """On CUDA, what is made inside the `with` and held by nobody at its end gives its memory back there: objects that
    hold each other, cuBLAS's workspaces, and what the allocator keeps. What came before is let go likewise, so that
    memory is measured from a clean start. Inside, segments are expandable (see `has_expandable_segments`)."""
    _release(device)
    try:
        with _expandable_segments(device):
            yield
    finally:
        _release(device)


def has_expandable_segments() -> bool:
    """Whether runs keep tensors in segments that grow (torch's `expandable_segments`), so that little is held unused:
    as the settings for the allocator say; without any, they do."""
    if allocator_settings.are_given():
        return allocator_settings.ask_for_expandable_segments()
    return _can_configure()


@contextlib.contextmanager
def _expandable_segments(device: torch.device) -> Iterator[None]:
    """Inside, new segments are expandable, where the user has no settings for the allocator. Batches of unlike sizes
    leave holes in segments of fixed size: 57 GiB held for 42 of tensors, and 4.0 for 2.4 of CUDA graphs
    (docs/decisions.md, 2026-11-29)."""
    if device.type != "cuda" or allocator_settings.are_given() or not _can_configure():
        yield
        return
    torch._C._accelerator_setAllocatorSettings(allocator_settings.EXPANDABLE)
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")


def _can_configure() -> bool:
    # torch has no public way to do it in a process that has begun
    return hasattr(torch._C, "_accelerator_setAllocatorSettings")


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        release_workspaces()
        torch.cuda.empty_cache()


def graph_pool_bytes(device: torch.device) -> int:
    """Bytes that CUDA graphs hold on a device for the tensors that are made and freed within a replay: the allocator
    counts those as allocated while they are captured, and never again."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["device"] == index and tuple(segment["segment_pool_id"]) != (0, 0)
    )


class ResidentPeak:
    """The peak of the process's physical memory inside a `with`, in `.result`, by the best means there is.

    Linux: the kernel's own high-water mark, set back at the start. Where that may not be written (some containers):
    sampled every 2 ms. macOS and others: the peak since the process began, under a name that says so; Windows: none.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self.result: dict[str, int] = {}
        self._proc = proc
        self._sampler: _Sampler | None = None

    def __enter__(self) -> Self:
        if (self._proc / "statm").exists() and not self._reset_high_water_mark():
            self._sampler = _Sampler(self._proc / "statm")
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._sampler is not None:
            self.result["resident"] = self._sampler.stop()
        elif (mark := _high_water_mark(self._proc)) is not None:
            self.result["resident"] = mark
        elif (since_start := _peak_since_start()) is not None:
            self.result["resident_since_start"] = since_start

    def _reset_high_water_mark(self) -> bool:
        """Set the mark back to what is resident now; True where that worked, which is looked at."""
        before = _high_water_mark(self._proc)
        try:
            (self._proc / "clear_refs").write_text("5")
        except OSError:
            return False
        after = _high_water_mark(self._proc)
        # some sandboxes take the write and do nothing: then the mark stands above what is resident
        return before is not None and after is not None and after - _resident(self._proc / "statm") < 2**20


class _Sampler(threading.Thread):
    """Reads the resident size every 2 ms and keeps the largest."""

    def __init__(self, statm: Path) -> None:
        super().__init__(daemon=True, name="resident-memory")
        self._statm = statm
        self._done = threading.Event()
        self._peak = _resident(statm)

    def run(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, _resident(self._statm))

    def stop(self) -> int:
        self._done.set()
        self.join()
        return max(self._peak, _resident(self._statm))


def _resident(statm: Path) -> int:
    """Bytes resident now: the second field of Linux's `statm`, in pages."""
    import resource

    return int(statm.read_text().split()[1]) * resource.getpagesize()


def _high_water_mark(proc: Path) -> int | None:
    """Bytes of `VmHWM` in Linux's `status`; None elsewhere."""
    try:
        lines = (proc / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _peak_since_start() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes, on macOS bytes
