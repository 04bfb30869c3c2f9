"""Numbers that a device is asked for while it goes on working."""

from __future__ import annotations

import torch
from torch import Tensor


class Answer:
    """Scalars on their way to the host.

    A plain `float(tensor)` comes at the end of all that the device was given by then, which may be the next step
    already. Here they are copied behind what makes them, and only that is waited for.

    Args:
        scalars: of any number type, on any devices; the copy follows the first one's current stream.
    """

    def __init__(self, *scalars: Tensor) -> None:
        device = scalars[0].device
        self._made: torch.cuda.Event | None = None
        # float64 holds whatever they are
        if device.type != "cuda":
            self._host = torch.stack([scalar.detach().cpu().double() for scalar in scalars])
            return
        together = torch.stack([scalar.detach().to(device, torch.float64) for scalar in scalars])
        # only into pinned memory is a copy made behind the host's back
        self._host = torch.empty(len(scalars), dtype=torch.float64, pin_memory=True)
        self._host.copy_(together, non_blocking=True)
        self._made = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._made.record(torch.cuda.current_stream(device))

    def values(self) -> list[float]:
        """The numbers, in their order, as soon as they are there."""
        if self._made is not None:
            self._made.synchronize()
        found: list[float] = self._host.tolist()
        return found
