"""Where a run stands: what a checkpoint's `state.json` says of it, each number with its type and its bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

Count = Annotated[int, Field(strict=True, ge=0, le=2**60)]
Seconds = Annotated[float, Field(strict=True, ge=0, le=1e12)]
#: rounding may take it a little below zero
Loss = Annotated[float, Field(strict=True, ge=-1e-3)]


@dataclass
class Progress:
    """Where a run stands."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    step: Count = 0
    epoch: Count = 0
    window: Count = 0  # optimizer steps taken in this epoch
    epoch_loss: Loss = 0.0
    epoch_targets: Count = 0
    tokens: Count = 0
    targets: Count = 0
    timed_tokens: Count = 0
    timed_seconds: Seconds = 0.0
    timed_cpu_seconds: Seconds = 0.0
    seconds: Seconds = 0.0
    last_epoch_loss: Loss | None = None
    base_valid_loss: Loss | None = None
    valid_loss: Loss | None = None
    valid_loss_by_source: dict[str, Loss] = field(default_factory=dict)
    best_loss: Loss | None = None
    best_loss_by_source: dict[str, Loss] = field(default_factory=dict)
    best_step: Count | None = None
    without_improvement: Count = 0
    peak_memory_bytes: dict[str, Count] = field(default_factory=dict)
    seconds_by_phase: dict[str, Seconds] = field(default_factory=dict)

    def problems(self, number: int, steps_per_epoch: int, total_steps: int) -> list[str]:
        """What cannot be of a run with so many steps, at the checkpoint of that number."""
        found = []
        if self.step != number:
            found.append(f"step is {self.step}, and the checkpoint is that of step {number}")
        if self.step > total_steps:
            found.append(f"step is {self.step}, and the run has {total_steps}")
        if self.window >= steps_per_epoch or self.step != self.epoch * steps_per_epoch + self.window:
            found.append(
                f"step {self.step} is not step {self.window} of epoch {self.epoch}: an epoch has {steps_per_epoch}"
            )
        if (self.best_step is None) != (self.best_loss is None) or (self.best_step or 0) > self.step:
            found.append(f"best_step is {self.best_step} with best_loss {self.best_loss}, at step {self.step}")
        if self.targets > self.tokens or self.epoch_targets > self.targets or self.timed_tokens > self.tokens:
            counts = f"{self.tokens} tokens, {self.targets} targets, {self.epoch_targets} of the epoch"
            found.append(f"counts do not fit together: {counts}, {self.timed_tokens} timed")
        return found
