"""The contract of an objective: what a model is trained for."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from spectune.errors import DataError, SpectuneError, first_line
from spectune.files.own_code import trusts


class TokenLosses(NamedTuple):
    """The losses of a batch's targets (tokens, or whole rows); N is their number."""

    losses: Tensor
    """`[N]` float32: nats, or squared errors."""
    rows: Tensor
    """`[N]` int64, the row of the batch that each target belongs to; ascending."""


class Objective(ABC):
    """What a model is trained for: the head it is loaded with, and the loss of a batch. It holds no state of a model.

    Losses are sums, not means: gradient accumulation weighs batches by their targets, so the caller divides once, by
    the targets of the whole step. They are taken in float32, whatever the model computes in.

    Attributes:
        task_type: PEFT's name for it.
        auto_class: transformers' class that loads a model with this head.
        packs: several texts may share a row of a batch.
    """

    task_type: ClassVar[str]
    auto_class: ClassVar[Any]
    packs: ClassVar[bool] = False

    def empty_model(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """A model of this config on the meta device: no weight is made or read. Options are those of `from_config`
        (`dtype`, ...). Code that comes with a base runs if its config was loaded so. Raises DataError: no model can be
        made of this config."""
        try:
            with torch.device("meta"):
                model: PreTrainedModel = self.auto_class.from_config(
                    config, trust_remote_code=trusts(config), **options
                )
        except SpectuneError:
            raise
        except Exception as error:  # models are code of many authors, and configs anybody's
            name = getattr(config, "_name_or_path", "") or "the base"
            raise DataError(
                f"{name}: no model can be made of its config.json ({type(error).__name__}: {first_line(error)}); copy "
                "it again from where it was written"
            ) from error
        return model

    @abstractmethod
    def precompute(self, batch: dict[str, Tensor]) -> None:
        """Add to a batch on the host what `loss_sum` would have to ask the device for, which would wait for it."""

    @abstractmethod
    def prepare(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Do now what the first `loss_sum` of a model does once, for batches with these entries."""

    def label_shape(self, rows: int, length: int) -> tuple[int, ...]:
        """The shape of a batch's `labels`."""
        return rows, length

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the model is given of a batch."""
        return inputs_of(batch)

    @abstractmethod
    def loss_sum(
        self, model: nn.Module, batch: Mapping[str, Any], *, fuse: bool = False, device_type: str | None = None
    ) -> tuple[Tensor, int]:
        """The loss summed over a batch's targets, with gradient, and their number.

        Args:
            batch: what the model takes (`input_ids`, `attention_mask`, ...) and `labels`, on the model's device.
            fuse: kernels may be compiled for the loss.
            device_type: "cpu" or "cuda": whose way of computing is taken; by default the batch's (a planner's batch is
                on "meta").
        """

    @abstractmethod
    def token_losses(
        self, model: nn.Module, batch: Mapping[str, Any], *, fuse: bool = False, device_type: str | None = None
    ) -> TokenLosses:
        """The loss of each target of a batch: the numbers that `loss_sum` sums, with gradient where gradients are
        wanted. Arguments as there."""


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is given of a batch."""
    return {"use_cache": False, **{name: value for name, value in batch.items() if name not in ("labels", "positions")}}
