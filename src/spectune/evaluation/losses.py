"""The loss of a model on each row of a data set: what validation loss and paired statistics are made of."""

import math
from collections import defaultdict
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
        return mean_per_token(self.loss_sums, self.target_tokens)

    def by_source(self, examples: Sequence[Example]) -> dict[str, float]:
        """The same of the rows of each source, see `by_source`; `examples` are those that the losses are of."""
        return by_source([example.row.source for example in examples], self.loss_sums, self.target_tokens)


def mean_per_token(loss_sums: Sequence[float], target_tokens: Sequence[int]) -> float:
    """Nats for each target token of rows, however they are spread over them."""
    return math.fsum(loss_sums) / sum(target_tokens)


def by_source(
    names: Sequence[str | None], loss_sums: Sequence[float], target_tokens: Sequence[int]
) -> dict[str, float]:
    """Nats per target token over the rows of each source that has any, in the order of the rows.

    Args:
        names: the source of each row, None where it is not known.

    Returns:
        {} where there is but one source, or none is known.
    """
    sums, tokens = defaultdict[str, list[float]](list), defaultdict[str, list[int]](list)
    for name, loss, count in zip(names, loss_sums, target_tokens, strict=True):
        if name is not None:
            sums[name].append(loss)
            tokens[name].append(count)
    if len(sums) < 2:
        return {}
    return {name: mean_per_token(sums[name], tokens[name]) for name in sums if sum(tokens[name])}


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
