"""The random numbers of one run among others that are trained beside it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class RandomStream:
    """torch's random numbers as one run draws them: from where they stand when this is made.

    Args:
        device: the model's; its numbers too, where that is a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._state = self._now()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, the run draws on from where it was; outside, nobody sees that it did."""
        before = self._now()
        self._set(self._state)
        try:
            yield
        finally:
            self._state = self._now()
            self._set(before)

    def restore(self) -> None:
        """Draw on from here, outside."""
        self._set(self._state)

    def _now(self) -> tuple[Tensor, Tensor | None]:
        own = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), own

    def _set(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self.device)
