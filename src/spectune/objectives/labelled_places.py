"""The loss of a head that gives one vector for each place: for each text, or for each token."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spectune.data.batching import IGNORED
from spectune.objectives.objective import Objective, TokenLosses


class LabelledPlaces(Objective):
    """A head whose outputs `[places, labels]` are compared with a label for each place; -100 (NaN, of numbers) is
    none."""

    def precompute(self, batch: dict[str, Tensor]) -> None:
        batch["positions"] = labelled_places(batch["labels"])

    def prepare(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Nothing has to be found out: the model's own forward is called."""

    def loss_sum(
        self, model: nn.Module, batch: Mapping[str, Any], *, fuse: bool = False, device_type: str | None = None
    ) -> tuple[Tensor, int]:
        losses = self.token_losses(model, batch, device_type=device_type).losses
        return losses.sum(), losses.numel()

    def token_losses(
        self, model: nn.Module, batch: Mapping[str, Any], *, fuse: bool = False, device_type: str | None = None
    ) -> TokenLosses:
        """One for each labelled place; with the gradient, where gradients are wanted.

        Raises:
            ValueError: the model gives outputs for other places than there are labels.
        """
        labels: Tensor = batch["labels"]
        positions: Tensor = batch["positions"] if "positions" in batch else labelled_places(labels)
        logits: Tensor = model(**self.inputs(model, batch)).logits
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"{type(model).__name__} gave outputs {list(logits.shape)}, labels are {list(labels.shape)}; expected "
                "one more dimension, the classes"
            )
        outputs = logits.flatten(0, -2).index_select(0, positions).float()
        found = self.losses(outputs, labels.flatten().index_select(0, positions))
        of_each_row = labels[0].numel() if labels.dim() > 1 else 1
        return TokenLosses(found, positions // of_each_row)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of each place `[N]`, float32: cross entropy in nats. `outputs`: `[N, labels]` float32."""
        return nn.functional.cross_entropy(outputs, labels, reduction="none")


def labelled_places(labels: Tensor) -> Tensor:
    """Places that have a label, in `labels` laid out flat: int64 `[N]`, ascending."""
    has = ~labels.isnan() if labels.is_floating_point() else labels != IGNORED
    return has.flatten().nonzero()[:, 0]


def model_inside(model: nn.Module) -> Any:
    """The model inside a compiled one, or one wrapped for several devices."""
    inner: Any = getattr(model, "_orig_mod", getattr(model, "module", model))
    return inner
