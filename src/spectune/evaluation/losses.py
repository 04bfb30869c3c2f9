"""The loss of a model on each row of a data set: what validation loss and paired statistics are made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from spectune.data import Example
from spectune.errors import DataError
from spectune.inference import halving, row_loss_sums


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Loss sums (nats) and numbers of target tokens, one of each for every row, in the order of the rows."""

    loss_sums: tuple[float, ...]
    target_tokens: tuple[int, ...]

    @property
    def mean_per_token(self) -> float:
        """Nats for each target token of the whole set: every token weighs the same, whichever row it stands in."""
        return math.fsum(self.loss_sums) / sum(self.target_tokens)


def row_losses(
    model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int, batch_size: int = 16
) -> RowLosses:
    """The loss of each example under the model's current route, in evaluation mode and without gradient.

    Where memory runs out the batch is halved, which is logged.

    Raises:
        OutOfMemoryError: a single example does not fit.
        DataError: there is no target token in any example, so that no mean exists.
    """
    doing = f"taking the loss of {len(examples)} rows"
    sums, counts = halving(lambda size: row_loss_sums(model, examples, pad_token_id, size), batch_size, doing)
    if sum(counts) == 0:
        raise DataError(f"{len(examples)} rows without a single target token; expected at least one to take a loss of")
    return RowLosses(tuple(sums), tuple(counts))
