"""Numbers copied from a device while it goes on working."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor


class AsyncScalars:
    """Scalars copied to the host without blocking the stream.

    A plain `float(tensor)` waits for all that was launched by then, which may be the next step already. Here they are
    copied behind what makes them, and only that is waited for.

    Args:
        scalars: of any number type, on any devices; the copy follows the first one's current stream.
    """

    def __init__(self, *scalars: Tensor) -> None:
        device = scalars[0].device
        self._place = slice(None)
        self._copied: torch.cuda.Event | None = None
        # float64 holds any number type
        if device.type != "cuda":
            self._host = torch.stack([scalar.detach().cpu().double() for scalar in scalars])
            return
        together = torch.stack([scalar.detach().to(device, torch.float64) for scalar in scalars])
        # only into pinned memory is a copy made behind the host's back
        self._host = torch.empty(len(scalars), dtype=torch.float64, pin_memory=True)
        self._host.copy_(together, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(torch.cuda.current_stream(device))

    @classmethod
    def of_each(cls, groups: Sequence[Sequence[Tensor]]) -> list[AsyncScalars]:
        """Several groups of scalars in one copy, one of these for each."""
        whole, found, begin = cls(*(scalar for group in groups for scalar in group)), list[AsyncScalars](), 0
        for group in groups:
            part = copy.copy(whole)
            part._place = slice(begin, begin := begin + len(group))
            found.append(part)
        return found

    def values(self) -> list[float]:
        """The numbers, in their order, as soon as they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        numbers: list[float] = self._host[self._place].tolist()
        return numbers
