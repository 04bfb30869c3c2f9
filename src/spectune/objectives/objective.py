"""The interface of an objective, which loop, planner, loading and validation go through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from spectune.data import Example


class TokenLosses(NamedTuple):
    """The losses of a batch's targets; N is their number."""

    losses: Tensor
    """`[N]` float32, in nats."""
    rows: Tensor
    """`[N]` int64, the row of the batch that each target belongs to; ascending."""


class Objective(ABC):
    """What a model is trained for. It holds no state: one instance serves every model.

    Attributes:
        auto_class: transformers' class that loads a model with this objective's head.
    """

    auto_class: ClassVar[Any]

    def empty_model(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """A model of this config on the meta device: no weight is made or read. Options are those of `from_config`
        (`dtype`, ...)."""
        with torch.device("meta"):
            model: PreTrainedModel = self.auto_class.from_config(config, **options)
        return model

    @abstractmethod
    def collate(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
        """A padded batch `[rows, length]` of some examples, with `labels`."""

    @abstractmethod
    def collate_packs(self, packs: Sequence[Sequence[Example]], pad_token_id: int) -> dict[str, Tensor]:
        """A batch of packs `[packs, length]`, each several examples one after the other, with `labels`."""

    @abstractmethod
    def precompute(self, batch: dict[str, Tensor]) -> None:
        """Add to a batch on the host what `loss_sum` would have to ask the device for, which would wait for it."""

    @abstractmethod
    def prepare(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Do now what the first `loss_sum` of a model does once, for batches with these entries."""

    @abstractmethod
    def loss_sum(
        self, model: nn.Module, batch: Mapping[str, Any], *, fuse: bool = False, device_type: str | None = None
    ) -> tuple[Tensor, int]:
        """The loss of a batch, summed over its targets, with gradient; and the number of targets.

        Args:
            batch: what the model takes and `labels`, on the model's device.
            fuse: compile what is done to logits.
            device_type: "cpu" or "cuda", whose way of computing is taken; by default the batch's (a planner's batch is
                on "meta").
        """

    @abstractmethod
    def token_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLosses:
        """The loss of each target of a batch, for validation: the same numbers that `loss_sum` sums, up to rounding."""
