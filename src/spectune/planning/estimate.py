"""What a plan says: bytes by term, the peak, whether it fits, and what to cut if not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TERMS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")
#: what a process holds of a CUDA device beside torch's allocator: driver context, kernels, cuBLAS and cuDNN handles.
#: 0.5 to 0.6 GiB with CUDA 12 and 13 on Hopper
CUDA_CONTEXT = 600 * 2**20


@dataclass(frozen=True)
class Moment:
    """The largest that one part of a step becomes: bytes by term, together."""

    name: str
    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Estimate:
    """The memory of one training step, in bytes.

    The terms are each one's own largest value in the step; they do not all live at once, so the peak is less than
    their sum: it is the largest of the `moments`, `peak_allocated` after the allocator's rounding.

    Attributes:
        weights: the base's and the delta's.
        gradients: of what is trained, with their float32 copies where the base has lower precision.
        optimizer: AdamW's two moments, float32, and float32 masters of weights of lower precision.
        activations: what forward keeps for backward, recomputed ones included.
        logits: from the last layer's output to the loss and back.
        workspace: what backward and kernels take and give back, cuBLAS's workspaces (CUDA).
        peak_allocated: of tensors, as torch counts them.
        peak_reserved: what torch's allocator holds of the device (on a CPU: the same as `peak_allocated`).
        context: what the process takes of a CUDA device beside that; in none of the other figures.
        validation: peak of a validation batch, by the same count; None where it was not asked for.
        moments: the parts of a step.
        source: "trace" (one layer of the model's own code, recorded without weights and repeated) or "full trace"
            (every layer was recorded, as they differ).
    """

    model: str
    method: str
    batch: int
    length: int
    dtype: str
    device: str
    gradient_checkpointing: bool
    trainable_parameters: int
    total_parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    peak_allocated: int
    peak_reserved: int
    context: int
    validation: int | None
    moments: tuple[Moment, ...]
    source: str
    #: the same for another batch and length, in bytes of `needed`, quick
    _again: Callable[[int, int], int] = field(repr=False, compare=False)
    #: tokens of a row that the base has positions for, less virtual ones
    _room: int | None = field(default=None, repr=False, compare=False)

    @property
    def peak_moment(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def needed(self) -> int:
        """Bytes of the device that the run needs: the larger of training and validation, and the context."""
        return max(self.peak_reserved, self.validation or 0) + self.context

    def memory(self) -> dict[str, int]:
        """What a result stores beside the measured peak."""
        return {
            **{term: getattr(self, term) for term in TERMS},
            "peak_allocated": self.peak_allocated,
            "peak_reserved": self.peak_reserved,
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("model", "method", "batch", "length", "dtype", "device", "gradient_checkpointing",
                 "trainable_parameters", "total_parameters", "context", "validation", "source", "needed")  # fmt: skip
        return {
            **{name: getattr(self, name) for name in names},
            **self.memory(),
            "peak_moment": self.peak_moment.name,
            "moments": {moment.name: {**moment.terms, "total": moment.total} for moment in self.moments},
        }
