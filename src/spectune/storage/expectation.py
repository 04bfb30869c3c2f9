"""What an export has to answer: a delta's logits and losses on some rows, kept so that its base can be freed before the
export is run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectune.compute.evaluating import evaluating
from spectune.deltas import Delta, route
from spectune.errors import ConfigError, some
from spectune.families import quantised_weights, vocabulary_rows
from spectune.objectives import SEQ_REGRESSION, Objective, objective_of, padding_of
from spectune.objectives.causal_lm import causal_lm_loss_sum
from spectune.objectives.labelled_places import LabelledPlaces, labelled_places

#: rows that an export is run on
ROWS = 16
#: of each row, the last so many positions are compared: logits are `[positions, vocabulary]`, and two of each are kept
POSITIONS = 64
FULL = (torch.float32, torch.float64)

Batch = Mapping[str, Tensor]
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class ExpectedAnswers:
    """Of each row the logits under the delta and of the bare base: float32 on the host, `[positions, vocabulary]`.

    Losses are means over the targets of all rows, whole, in `loss_unit`; None where no row has a target.

    Attributes:
        objective: what the model is for: the loss of its logits.
        head: what its reader loads the base with, beside the name: the sizes of a head that the base does not have.
    """

    batches: list[Batch]
    tuned: list[Tensor]
    bare: list[Tensor]
    tuned_loss: float | None
    bare_loss: float | None
    objective: Objective
    base_class: type[PreTrainedModel]
    head: dict[str, Any]
    #: float32 throughout: what differs is a fault, or the order of sums
    exact: bool
    dtype: torch.dtype
    device: torch.device
    measured_on: str

    @property
    def loss_unit(self) -> str:
        """What losses are counted in."""
        if self.objective is SEQ_REGRESSION:
            return "squared error"
        return {"CAUSAL_LM": "nats per token", "SEQ_CLS": "nats per row"}.get(self.objective.task_type, "nats per word")


def spread(items: Sequence[Item], count: int = ROWS) -> list[Item]:
    """At most `count` of the items, spread evenly over all of them: files are often sorted."""
    taken = min(count, len(items))
    return [items[index * len(items) // taken] for index in range(taken)]


def expected_answers(delta: Delta, batches: Sequence[Batch], source: str = "the rows given") -> ExpectedAnswers:
    """What the delta answers on rows, and what its bare base does.

    Args:
        batches: one row each, as `spectune.data.collate([example], 0)` makes it: `input_ids`, `attention_mask`,
            `labels`, each `[1, length]`.
        source: what rows these are, in words.

    Raises:
        ConfigError: no rows; ids that the base does not have; the base is quantised, and the export's will not be.
    """
    model = delta.model
    if not batches:
        raise ConfigError(f"an export is proved on rows, and {source} have none that can be encoded: name others")
    _check_ids(batches, vocabulary_rows(model))
    held = quantised_weights(model)
    if held and getattr(model.config, "quantization_config", None) is None:  # a checkpoint's own comes back with it
        raise ConfigError(
            f"this base is quantised ({some(list(held))}), and an export is for the base as it is: load it without "
            "base_precision, load the delta there, and export from there"
        )
    objective = objective_of(model)
    with evaluating(model):
        with route(model, delta.name):
            tuned = [_answer(model, objective, batch) for batch in batches]
        with route(model, None):
            bare = [_answer(model, objective, batch) for batch in batches]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return ExpectedAnswers(
        batches=list(batches),
        tuned=[logits for logits, _ in tuned],
        bare=[logits for logits, _ in bare],
        tuned_loss=mean_loss([loss for _, loss in tuned]),
        bare_loss=mean_loss([loss for _, loss in bare]),
        objective=objective,
        base_class=type(model),
        head=_head_of(model) if delta.family.trained_head else {},
        exact=model.dtype in FULL and not held,
        dtype=model.dtype,
        device=model.device,
        measured_on=f"{len(batches)} of {source} ({tokens:,} tokens)",
    )


def kept(logits: Tensor) -> Tensor:
    """What is compared of a row's logits `[1, length, vocabulary]` (or `[1, labels]`, of a head for whole rows)."""
    return (logits[0][-POSITIONS:] if logits.dim() == 3 else logits).float().cpu()


def loss_of(objective: Objective, logits: Tensor, batch: Batch) -> tuple[float, int]:
    """The loss of one row's logits summed over its targets, and their number."""
    labels = batch["labels"].to(logits.device)
    if not isinstance(objective, LabelledPlaces):
        total, count = causal_lm_loss_sum(logits, labels)
        return float(total), count
    places = labelled_places(labels)
    losses = objective.losses(logits.flatten(0, -2)[places].float(), labels.flatten()[places])
    return float(losses.sum()), losses.numel()


def mean_loss(losses: Sequence[tuple[float, int]]) -> float | None:
    """The mean over the targets of all rows."""
    count = sum(number for _, number in losses)
    return math.fsum(total for total, _ in losses) / count if count else None


def inputs_of(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What a model is called with."""
    return {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}


def _answer(model: PreTrainedModel, objective: Objective, batch: Batch) -> tuple[Tensor, tuple[float, int]]:
    logits: Tensor = model(**inputs_of(batch, model.device), use_cache=False).logits
    return kept(logits), loss_of(objective, logits, batch)


def _head_of(model: PreTrainedModel) -> dict[str, Any]:
    """The base's checkpoint may have no head, or one for other classes: PEFT's folder brings it."""
    config = model.config
    given = {"pad_token_id": padding_of(config), "problem_type": config.problem_type}
    known = {name: value for name, value in given.items() if value is not None}
    return {"num_labels": config.num_labels, **known, "ignore_mismatched_sizes": True}


def _check_ids(batches: Sequence[Batch], vocabulary: int) -> None:
    highest = max(int(batch["input_ids"].max()) for batch in batches)
    if highest >= vocabulary:
        raise ConfigError(f"rows have token {highest}, this base has {vocabulary}: encode them with its own tokenizer")
