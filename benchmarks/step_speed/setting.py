"""What one measurement works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.shapes import build
from benchmarks.step_speed.data import token_batches
from benchmarks.step_speed.grid import Case, Shape, text_length
from benchmarks.step_speed.meter import Meter
from torch import Tensor
from transformers import PretrainedConfig

from spectune.data.batching import IGNORED


@dataclass
class Setting:
    """A case, its batches (`[rows, length]` token ids on the CPU) and its meter."""

    case: Case
    shape: Shape
    device: torch.device
    warmup: int
    steps: int
    config: PretrainedConfig = field(init=False)
    batches: list[Tensor] = field(init=False)
    meter: Meter = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.shape.config()
        for name in vars(self.config):
            if name.endswith(("pdrop", "dropout")):
                setattr(self.config, name, 0.0)  # random masks would make losses of the same step differ
        self.rows, self.length = self.shape.rows, text_length(self.shape, self.case.method)
        self.batches = token_batches(self.rows, self.length, self.config.vocab_size)
        self.meter = Meter(self.device, self.rows * self.length, warmup=self.warmup, steps=self.steps)
        self.dtype: torch.dtype = getattr(torch, self.shape.dtype)

    def labelled(self, ids: Tensor) -> Tensor:
        """Labels of a batch `[rows, length]`: every token, but for the first of a row, which nothing stands before.
        (Marked, because some peers would count it in the mean, and PEFT's prompt would learn it from a virtual token.)
        """
        labels = ids.clone()
        labels[:, 0] = IGNORED
        return labels

    @property
    def most_steps(self) -> int:
        """No measurement takes more."""
        return max(self.meter.most, self.warmup) + self.steps

    def build(self, dtype: torch.dtype | None = None) -> Any:
        """The base: the same random weights in every process on the same kind of device."""
        torch.manual_seed(0)
        return build(self.config, self.device, dtype or self.dtype)
