"""Real steps with every tensor counted: what the planner's figures are held against."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from spectune.blocks.offload import Transfers
from spectune.blocks.recompute import Recomputation, recomputing
from spectune.compute.linear_cross_entropy import linear_cross_entropy_sum
from spectune.compute.memory import AllocationTracker
from spectune.deltas import Delta
from spectune.objectives import CAUSAL_LM
from spectune.training import TrainingConfig
from spectune.training.optimizer import MasterAdamW
from spectune.training.optimizers import make_optimizer


def batch(rows: int, length: int, vocabulary: int, *, shorter: int = 0) -> dict[str, torch.Tensor]:
    """Random rows, all but the first token learned; the first row is whole, others are `shorter` by so many."""
    ids = torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if shorter:
        mask[1:, length - shorter :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    # as the loop: no mask where it would hide nothing
    return {"input_ids": ids, "labels": labels} | ({"attention_mask": mask} if shorter else {})


def real_peak(
    model: PreTrainedModel,
    delta: Delta,
    inputs: dict[str, torch.Tensor],
    *,
    checkpointing: Recomputation,
    transfers: Transfers | None = None,
    optim: str = "adamw_torch_fused",
) -> int:
    """Bytes of tensors at the peak of two steps on the CPU, counted one by one."""
    config = TrainingConfig(optim=optim, max_grad_norm=0.0 if optim == "adamw_in_backward" else 1.0)
    optimizer = make_optimizer(list(delta.parameters()), config, 1e-4)
    model.train()
    peak = 0
    with recomputing(model, checkpointing, transfers=transfers):
        for _ in range(2):
            with AllocationTracker([*model.parameters(), *optimizer.tensors()]) as tracker:
                optimizer.begin(1e-4)
                loss, targets = CAUSAL_LM.loss_sum(model, inputs)
                torch.autograd.backward(loss / targets)
                del loss
                optimizer.step(1e-4, config.max_grad_norm)
            peak = max(peak, tracker.peak_bytes)
    optimizer.close()
    return peak


def fake_peak(model: PreTrainedModel, delta: Delta, rows: int, length: int, *, checkpointing: Recomputation) -> int:
    """The same of whole rows under FakeTensorMode, where shapes of any size cost nothing. To be called inside it.

    What takes values to know (which positions are learned) is written with numbers: all but the last of each row.
    """
    config = TrainingConfig()
    optimizer = MasterAdamW(list(delta.parameters()), config, 1e-4)
    model.train()
    peak = 0
    with recomputing(model, checkpointing):
        for _ in range(2):
            with AllocationTracker([*model.parameters(), *optimizer.tensors()]) as tracker:
                loss = _whole_rows_loss(model, rows, length)
                torch.autograd.backward(loss / 7)
                del loss
                with torch.no_grad():
                    gradients = optimizer.take_gradients()
                    for members in optimizer.groups:
                        optimizer._step(members, gradients, math.inf, torch.ones(()))
            peak = max(peak, tracker.peak_bytes)
    return peak


def _whole_rows_loss(model: PreTrainedModel, rows: int, length: int) -> torch.Tensor:
    ids: Any = torch.zeros(rows, length, dtype=torch.int64)
    mask = torch.ones_like(ids)
    positions = torch.zeros(rows * (length - 1), dtype=torch.int64)
    targets = torch.zeros_like(positions)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False)[0]
    chosen = hidden.flatten(0, 1).index_select(0, positions)
    del hidden, mask
    return linear_cross_entropy_sum(chosen, model.get_output_embeddings().weight, targets)
