"""Causal language modelling: its loss is summed over target tokens, in float32 and on labelled positions only.

Sums, not means: gradient accumulation weighs micro-batches by their target tokens, so the caller divides once, by the
tokens of the whole step.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, modeling_utils

from spectune.compute.head import LinearHead, linear_head
from spectune.compute.linear_cross_entropy import (
    linear_cross_entropy_losses,
    linear_cross_entropy_sum,
    rows_of_a_chunk,
)
from spectune.data.batching import IGNORED
from spectune.objectives.objective import Objective, TokenLosses, inputs_of


def target_mask(labels: Tensor) -> Tensor:
    """Which positions predict a target: `[batch, length - 1]`, True at t where the token at t + 1 is one."""
    return labels[:, 1:] != IGNORED


def target_positions(labels: Tensor) -> Tensor:
    """The places that predict a target in `labels` `[batch, length]` laid out flat: int64 `[N]`, ascending."""
    return F.pad(target_mask(labels), (0, 1)).flatten().nonzero()[:, 0]


def causal_lm_loss_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Cross entropy summed over target tokens, computed in float32 whatever `logits` are.

    Only labelled rows are converted to float32: at a large vocabulary the whole of it would be the largest tensor of
    a training step.

    Args:
        logits: `[batch, length, vocabulary]`, of any floating type; position t predicts the label at t + 1.
        labels: `[batch, length]` int64, -100 where there is no target. The first column is never a target.

    Returns:
        the sum in nats (float32 scalar, with gradient; 0 where there is no target), and the number of target tokens.

    Raises:
        ValueError: the two shapes do not belong together.
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits are {list(logits.shape)}, labels are {list(labels.shape)}; "
            "expected [batch, length, vocabulary] and [batch, length] of the same batch and length"
        )
    keep = target_mask(labels)
    targets = labels[:, 1:][keep]
    return F.cross_entropy(logits[:, :-1][keep].float(), targets, reduction="sum"), targets.numel()


class LabelledLogits(NamedTuple):
    """The logits of target tokens and nothing else; N is the number of target tokens of the batch."""

    logits: Tensor
    """`[N, vocabulary]`, in the model's dtype."""
    targets: Tensor
    """`[N]` int64."""
    rows: Tensor
    """`[N]` int64, the row of the batch that each target stands in; in order."""


class CausalLM(Objective):
    """Causal language modelling: each token is predicted from those before it, with loss on labelled tokens."""

    task_type = "CAUSAL_LM"
    auto_class = AutoModelForCausalLM
    packs = True

    def precompute(self, batch: dict[str, Tensor]) -> None:
        batch["positions"] = target_positions(batch["labels"])

    def prepare(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        linear_head(model, inputs_of(batch))

    def loss_sum(
        self, model: nn.Module, batch: Mapping[str, Any], *, fuse: bool = False, device_type: str | None = None
    ) -> tuple[Tensor, int]:
        """Cross entropy summed over target tokens, with gradient, and their number; without logits that no target
        needs, and a chunk of them at a time.

        Where the model's logits are a linear head's (see `linear_head`), the decoder is called and the head's loss is
        taken in chunks (`linear_cross_entropy_sum`), so that the logits never exist at once. Where not, they come from
        `labelled_logits`. The result is that of `causal_lm_loss_sum(model(...).logits, labels)` up to rounding.

        Args:
            batch: as `labelled_logits` takes it; with `positions` (from `precompute`, on the labels' device) nothing
                is read back from the device.
            fuse: as `linear_cross_entropy_sum` has it; without effect on logits that exist.
            device_type: "cpu" or "cuda", whose chunks are taken; by default those of the batch's device (a planner's
                batch is on "meta").

        Raises:
            ValueError: the decoder gives hidden states for other positions than the batch has.
        """
        inputs = inputs_of(batch)
        head = linear_head(model, inputs)
        if head is None:
            found = self.labelled_logits(model, batch)
            return F.cross_entropy(found.logits.float(), found.targets, reduction="sum"), found.targets.numel()
        rows, targets, _ = _labelled_states(model, head, inputs, batch)
        size = rows_of_a_chunk(rows.shape[0], head.weight, device_type or rows.device.type)
        loss = linear_cross_entropy_sum(
            rows, head.weight, targets, head.bias, scale=head.scale, softcap=head.softcap, chunk_rows=size, fuse=fuse
        )
        return loss, targets.numel()

    def token_losses(
        self, model: nn.Module, batch: Mapping[str, Any], *, fuse: bool = False, device_type: str | None = None
    ) -> TokenLosses:
        """The loss of each target of a batch: the same numbers that `loss_sum` sums, up to rounding, with gradient
        where gradients are wanted; with a linear head that is not trained a chunk of logits at a time, as there.
        Arguments and errors as there."""
        inputs = inputs_of(batch)
        head = linear_head(model, inputs)
        if head is None or (torch.is_grad_enabled() and head.weight.requires_grad):
            found = self.labelled_logits(model, batch)
            return TokenLosses(F.cross_entropy(found.logits.float(), found.targets, reduction="none"), found.rows)
        rows, targets, positions = _labelled_states(model, head, inputs, batch)
        size = rows_of_a_chunk(rows.shape[0], head.weight, device_type or rows.device.type)
        losses = linear_cross_entropy_losses(
            rows, head.weight, targets, head.bias, scale=head.scale, softcap=head.softcap, chunk_rows=size, fuse=fuse
        )
        return TokenLosses(losses, positions // batch["labels"].shape[1])

    def labelled_logits(self, model: nn.Module, batch: Mapping[str, Any]) -> LabelledLogits:
        """The logits that predict the targets of a batch, with the model's head run on no more positions than it must.

        At small hidden sizes the head is most of a step's work, and prompt and padding need none of it. What stands
        after the head (soft caps, scaling) is the model's own, because the model's own `forward` is called: with
        `logits_to_keep` as far as it has that argument (see `head_selection`), in full otherwise.

        Args:
            batch: what the model takes (`input_ids`, `attention_mask`, ...) and `labels` `[batch, length]`, on the
                model's device.
        """
        inputs = inputs_of(batch)
        labels: Tensor = batch["labels"]
        keep, targets = target_mask(labels), labels[:, 1:]
        positions = _positions_for_head(keep, head_selection(model))
        if positions is not None:
            inputs["logits_to_keep"] = positions
        logits = model(**inputs).logits
        if logits.shape[:2] == labels.shape:  # all positions: nothing was selected, or the model ignores the argument
            logits = logits[:, :-1]
        elif positions is not None:
            keep, targets = _select(keep, positions), _select(targets, positions)
        if logits.shape[:2] != keep.shape:
            raise ValueError(
                f"{type(model).__name__} gave logits for {list(logits.shape[:2])} [batch, positions]; expected "
                f"{list(keep.shape)}. Its logits_to_keep means something else: use causal_lm_loss_sum on its full "
                "logits."
            )
        return LabelledLogits(logits[keep], targets[keep], keep.nonzero()[:, 0])


CAUSAL_LM = CausalLM()


def _labelled_states(
    model: nn.Module, head: LinearHead, inputs: Mapping[str, Any], batch: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the head is given for the targets of a batch `[N, d]`, the targets `[N]`, and the places that predict them
    in the labels laid out flat `[N]`. Raises ValueError as `CausalLM.loss_sum`."""
    labels: Tensor = batch["labels"]
    # before the decoder runs: their number is read back from the device, which has least to finish now
    positions: Tensor = batch["positions"] if "positions" in batch else target_positions(labels)
    targets = labels.flatten().index_select(0, positions + 1)
    hidden = head.hidden(inputs)
    if hidden.shape[:2] != labels.shape:
        raise ValueError(
            f"the decoder of {type(model).__name__} gave hidden states for {list(hidden.shape[:2])} [batch, "
            f"positions]; expected {list(labels.shape)}. Use causal_lm_loss_sum on the model's logits."
        )
    return hidden.flatten(0, 1).index_select(0, positions), targets, positions


def head_selection(model: nn.Module) -> str:
    """How the model's `logits_to_keep` selects the positions that its head runs on.

    Returns:
        "row": an index tensor `[batch, positions]`, each row its own (newer transformers, through its
        `slice_logits_to_keep`); "column": an index tensor `[positions]` that all rows share, as transformers documents
        `logits_to_keep`; "none": the model has no such argument.
    """
    # the model inside a compiled one, or one wrapped for several devices
    inner = getattr(model, "_orig_mod", getattr(model, "module", model))
    forward = inspect.unwrap(type(inner).forward)
    if "logits_to_keep" not in inspect.signature(forward).parameters:
        return "none"
    # Read from the code, not found by trial: a trial would run the model, its hooks and its random state.
    return "row" if "slice_logits_to_keep" in forward.__code__.co_names and _slice_takes_rows() else "column"


@functools.cache
def _slice_takes_rows() -> bool:
    """Whether transformers' own slicing function selects positions row by row, found by calling it."""
    function = getattr(modeling_utils, "slice_logits_to_keep", None)
    return bool(function and function(torch.zeros(2, 3, 1), torch.tensor([[0], [2]])).shape == (2, 1, 1))


def _positions_for_head(keep: Tensor, selection: str) -> Tensor | None:
    """The positions to ask for: the targets of each row, filled up with others to the longest row's number; or all
    columns that hold a target. None for all positions."""
    if selection == "row":
        longest = max(int(keep.sum(1).max()), 1) if keep.numel() else 0
        # stable: a row's targets stay in order, before its other positions
        return keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    if selection == "column":
        columns = keep.any(0).nonzero()[:, 0]
        return columns if columns.numel() or not keep.numel() else columns.new_zeros(1)
    return None


def _select(tensor: Tensor, positions: Tensor) -> Tensor:
    return tensor.gather(1, positions) if positions.dim() == 2 else tensor[:, positions]
