"""Stand-in for a CUDA stream that copies to host memory: copies are made as late as the rules of streams allow."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor


class LateTransfers:
    """Copies are queued, and made in order when somebody waits for one. What was not waited for is not there: a tensor
    on its way back holds NaN until then, and one that left and was freed before it was copied is an error."""

    def __init__(self, log: list[tuple[str, int]] | None = None) -> None:
        self.log = [] if log is None else log
        self.buffers: list[np.ndarray[Any, Any]] = []
        self._queue: list[tuple[int, Any]] = []
        self._count = 0

    def buffer(self, size: int) -> np.ndarray[Any, Any]:
        self.buffers.append(np.full(size, 255, dtype=np.uint8))
        return self.buffers[-1]

    def size(self, buffer: np.ndarray[Any, Any]) -> int:
        return int(buffer.size)

    def leave(self, tensor: Tensor, buffer: np.ndarray[Any, Any]) -> int:
        self.log.append(("leave", self._number(buffer)))
        # not `tensor` itself, which a new Python object may stand for any time: its memory
        alive = weakref.ref(tensor.untyped_storage())
        values = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        del tensor

        def copy() -> None:
            assert alive() is not None, "freed before it was copied"
            buffer[: values.size] = values

        return self._add(copy)

    def come_back(self, buffer: np.ndarray[Any, Any], shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, int]:
        self.log.append(("come back", self._number(buffer)))
        found = torch.full(shape, float("nan"), dtype=dtype)
        goal = found.flatten().view(torch.uint8).numpy()

        def copy() -> None:
            goal[:] = buffer[: goal.size]

        return found, self._add(copy)

    def wait(self, copied: int) -> None:
        while self._queue and self._queue[0][0] <= copied:
            self._queue.pop(0)[1]()

    def _add(self, copy: Any) -> int:
        self._count += 1
        self._queue.append((self._count, copy))
        return self._count

    def _number(self, buffer: np.ndarray[Any, Any]) -> int:
        return next(index for index, other in enumerate(self.buffers) if other is buffer)
