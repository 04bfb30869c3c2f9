"""Sequence classification and regression: a class, or a number, for a whole text.

The model's own forward gives its head's output at the text's last token, which it finds by the padding id of its
config: the last token of `input_ids` that is another one.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from spectune.errors import ConfigError
from spectune.objectives.labelled_places import LabelledPlaces, model_inside


class SequenceClassification(LabelledPlaces):
    """A class for each row: cross entropy in nats, summed over rows. `labels` `[batch]` int64."""

    task_type = "SEQ_CLS"
    auto_class: Any = AutoModelForSequenceClassification

    def label_shape(self, rows: int, length: int) -> tuple[int, ...]:
        return (rows,)

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Tokens that the mask hides are the config's padding, whatever the batch was filled up with. Raises
        ConfigError: there are several rows, and the config has no padding id."""
        given = super().inputs(model, batch)
        ids, mask = given["input_ids"], given.get("attention_mask")
        padding = padding_of(model_inside(model).config)
        if padding is None and ids.shape[0] > 1:
            raise ConfigError(
                f"{type(model).__name__} has no config.pad_token_id, by which it finds the last token of each text: "
                "set model.config.pad_token_id = tokenizer.pad_token_id (or eos_token_id); spectune.load does so"
            )
        if padding is not None and mask is not None:
            given["input_ids"] = ids.masked_fill(mask == 0, padding)
        return given


class SequenceRegression(SequenceClassification):
    """A number for each row: squared errors, summed over rows. `labels` `[batch]` float32."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs[:, 0] - labels.float()).square()


def padding_of(config: Any) -> int | None:
    """The id by which a model finds where a text ends, None where its config has none."""
    found = getattr(config.get_text_config(), "pad_token_id", None)
    return found if isinstance(found, int) else None


SEQ_CLS, SEQ_REGRESSION = SequenceClassification(), SequenceRegression()
