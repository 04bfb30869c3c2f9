"""AdamW whose moments are kept in eight bits: 2 bytes a weight instead of 8.

The step is `MasterAdamW`'s in float32; between steps the first moment and the root of the second are kept as codes
(`spectune.compute.dynamic_codes`). The root, not the second moment itself: a small one would be rounded to none, and
the step divided by nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectune.compute.dynamic_codes import BLOCK, LEAST, codes_of, values_of
from spectune.training.config import TrainingConfig
from spectune.training.optimizer import Kind, MasterAdamW

#: name of a moment -> whether it may be negative
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}


class EightBitAdamW(MasterAdamW):
    """`MasterAdamW` with moments of weights of at least 4,096 numbers in eight bits."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], config: TrainingConfig, learning_rate: float,
        factors: Sequence[float] = (),
    ) -> None:  # fmt: skip
        super().__init__(parameters, config, learning_rate, factors)
        #: number of a weight -> name of a moment -> codes and scales
        self.codes: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def _step(self, members: Sequence[int], gradients: list[Tensor | None], max_norm: float, norm: Tensor) -> None:
        stepped = [index for index in members if gradients[index] is not None]
        for index in stepped:
            self._decode(index)
        super()._step(members, gradients, max_norm, norm)
        for index in stepped:
            if self.masters[index].numel() >= LEAST:
                self._encode(index)

    def _decode(self, index: int) -> None:
        master = self.masters[index]
        for name, (codes, scales) in self.codes.pop(index, {}).items():
            values = values_of(codes, scales, master.shape, signed=_MOMENTS[name])
            self.inner.state[master][name] = values if _MOMENTS[name] else values.square_()

    def _encode(self, index: int) -> None:
        state, self.codes[index] = self.inner.state[self.masters[index]], {}
        for name, signed in _MOMENTS.items():
            values = state.pop(name)
            self.codes[index][name] = codes_of(values if signed else values.sqrt_(), signed=signed)
            del values

    def tensors(self) -> list[Tensor]:
        coded = [part for moments in self.codes.values() for pair in moments.values() for part in pair]
        return super().tensors() + coded

    def state_dict(self) -> dict[str, Tensor]:
        found = super().state_dict()
        for index, moments in self.codes.items():
            for name, (codes, scales) in moments.items():
                found[f"{index}.{name}_codes"], found[f"{index}.{name}_scales"] = codes, scales
        return found

    def _kinds(self, index: int) -> dict[str, Kind]:
        found, numbers = super()._kinds(index), self.masters[index].numel()
        if numbers < LEAST:
            return found
        blocks = -(-numbers // BLOCK)
        for name in _MOMENTS:
            del found[name]
            found[f"{name}_codes"] = torch.Size([blocks, BLOCK]), torch.uint8
            found[f"{name}_scales"] = torch.Size([blocks, 1]), torch.float32
        return found

    def _put(self, index: int, name: str, value: Tensor) -> None:
        moment, _, part = name.rpartition("_")
        if part not in ("codes", "scales"):
            super()._put(index, name, value)
            return
        moments = self.codes.setdefault(index, {})
        codes, scales = moments.get(moment, (value, value))
        moments[moment] = (value, scales) if part == "codes" else (codes, value)
