"""Hidden states in host memory between forward and backward: what recomputation keeps, off the device.

A block that is recomputed keeps its input and nothing else, so that the inputs of all blocks are what a long step
holds. Here they go to host memory while the block runs, on a stream of their own, and come back one block ahead of
backward.

Streams: all copies run on one side stream, in order, so a host buffer may be used again as soon as nobody needs what is
in it. Device memory is taken and given back in the order of the computing stream alone: what leaves is held until the
computing stream has been told to wait for its copy, and the side stream waits for the computing stream before it writes
into what that one took. So no `record_stream` is needed, and the peak does not depend on how far the CPU is ahead.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

#: smaller tensors stay on the device: a copy of them is not worth its launch
LEAST_BYTES = 2**20


class Transfers(Protocol):
    """Copies between a device and host memory, in order, beside the computation."""

    def buffer(self, size: int) -> Any:
        """Host memory of `size` bytes."""

    def size(self, buffer: Any) -> int:
        """Bytes that a buffer holds at most."""

    def leave(self, tensor: Tensor, buffer: Any) -> Any:
        """Begin to copy `tensor`, which the computation has made, into `buffer`. Returns what `wait` takes."""

    def come_back(self, buffer: Any, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """Begin to copy what left back into a new tensor. Returns it, and what `wait` has to be called with before
        anything is read from it."""

    def wait(self, copied: Any) -> None:
        """What the computation does from now on comes after that copy."""


class CudaTransfers:
    """Copies to pinned host memory on a CUDA stream beside the current one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def size(self, buffer: Tensor) -> int:
        return buffer.numel()

    def leave(self, tensor: Tensor, buffer: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            as_tensor(buffer, tensor.shape, tensor.dtype).copy_(tensor.detach(), non_blocking=True)
            copied: torch.cuda.Event = self.stream.record_event()
        return copied

    def come_back(self, buffer: Tensor, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, torch.cuda.Event]:
        # from the computing stream's memory, in which it may still be working on what stood there before
        found = torch.empty(shape, dtype=dtype, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            found.copy_(as_tensor(buffer, shape, dtype), non_blocking=True)
            return found, self.stream.record_event()

    def wait(self, copied: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(copied)


def as_tensor(buffer: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The beginning of a buffer of bytes (uint8, one dimension) as a tensor of that shape and dtype."""
    return buffer[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


class MetaTransfers:
    """Copies of tensors without memory, for a plan; `host_bytes` are those of all buffers, which torch's allocator of
    pinned memory rounds up to powers of two (aten/src/ATen/core/CachingHostAllocator.h)."""

    def __init__(self) -> None:
        self.host_bytes = 0

    def buffer(self, size: int) -> int:
        self.host_bytes += 1 << (size - 1).bit_length()
        return size

    def size(self, buffer: int) -> int:
        return buffer

    def leave(self, tensor: Tensor, buffer: int) -> None: ...

    def come_back(self, buffer: int, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, None]:
        with torch.enable_grad():  # a tracer tells activations from scratch space by this
            return torch.empty(shape, dtype=dtype, device="meta"), None

    def wait(self, copied: None) -> None: ...


class HostStates:
    """The inputs of a model's blocks in host memory. One for a model; buffers are used again from step to step."""

    def __init__(self, transfers: Transfers, least_bytes: int = LEAST_BYTES) -> None:
        self.transfers, self.least_bytes = transfers, least_bytes
        self._free: list[Any] = []
        self._newest: weakref.ref[_Slot] | None = None

    @contextlib.contextmanager
    def leaving(self, hidden: Tensor, *, last: bool) -> Iterator[None]:
        """Inside, autograd keeps `hidden` in host memory; other tensors stay where they are. After the `last` block
        comes none, so backward needs its input at once: it stays on the device, and the one before comes back beside
        its backward."""
        # autograd keeps the hooks as long as what they packed: they may hold no tensor beyond this block
        held: list[tuple[Tensor, Any]] = []
        storage, shape = hidden.untyped_storage()._cdata, hidden.shape
        size = hidden.numel() * hidden.element_size()

        def pack(tensor: Tensor) -> Tensor | _Slot:
            if tensor.untyped_storage()._cdata != storage or tensor.shape != shape or size < self.least_bytes:
                return tensor
            slot = _Slot(self, tensor, self._newest)
            self._newest = weakref.ref(slot)
            if last:
                slot.kept = tensor
            else:
                slot.buffer = self._buffer(size)
                held.append((tensor, self.transfers.leave(tensor, slot.buffer)))
            return slot

        def unpack(packed: Tensor | _Slot) -> Tensor:
            return packed.take() if isinstance(packed, _Slot) else packed

        try:
            with saved_tensors_hooks(pack, unpack):
                yield
        finally:
            # the block has been queued by now, so this costs nothing, and lets its input go in the block's own order
            for _, copied in held:
                self.transfers.wait(copied)
            held.clear()

    def _buffer(self, size: int) -> Any:
        """The smallest free buffer that is large enough, or a new one. The first batch of a run is its longest."""
        enough = [buffer for buffer in self._free if self.transfers.size(buffer) >= size]
        if not enough:
            return self.transfers.buffer(size)
        best = min(enough, key=self.transfers.size)
        self._free = [buffer for buffer in self._free if buffer is not best]
        return best

    def give_back(self, buffer: Any) -> None:
        self._free.append(buffer)


class _Slot:
    """One block's input: on its way out, in host memory, or on its way back."""

    def __init__(self, states: HostStates, tensor: Tensor, before: weakref.ref[_Slot] | None) -> None:
        self.states, self.before, self.shape, self.dtype = states, before, tensor.shape, tensor.dtype
        self.buffer: Any = None
        self.kept: Tensor | None = None
        self._coming: tuple[Tensor, Any] | None = None

    def take(self) -> Tensor:
        """The tensor again, and the one that backward needs next on its way."""
        self.come_back()
        before = None if self.before is None else self.before()
        if before is not None:
            before.come_back()
            self.before = None  # once: a second backward through the same graph fetches each by itself
        if self.kept is not None:
            return self.kept
        assert self._coming is not None
        (tensor, copied), self._coming = self._coming, None
        self.states.transfers.wait(copied)
        return tensor

    def come_back(self) -> None:
        if self.kept is None and self._coming is None:
            self._coming = self.states.transfers.come_back(self.buffer, self.shape, self.dtype)

    def __del__(self) -> None:
        if self._coming is not None:  # fetched and never used: its memory may not be given to others before it is there
            self.states.transfers.wait(self._coming[1])
        if self.buffer is not None:
            self.states.give_back(self.buffer)
