"""Numbers on devices, each sequence put there once: what is captured reads it again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DeviceNumbers:
    """Sequences of numbers as tensors, kept."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}

    def whole(self, device: torch.device, values: Sequence[int]) -> Tensor:
        """These as int64."""
        return self._of(device, tuple(map(int, values)), torch.int64)

    def real(self, device: torch.device, values: Sequence[float]) -> Tensor:
        """These as float32."""
        return self._of(device, tuple(map(float, values)), torch.float32)

    def _of(self, device: torch.device, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.tensor(values, dtype=dtype, device=device)
        key = values, dtype, device
        found = self._made.get(key)
        if found is None:
            with torch.inference_mode(False):  # a later pass may want gradients
                found = self._made[key] = torch.tensor(values, dtype=dtype, device=device)
        return found
