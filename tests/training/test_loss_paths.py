"""200 real steps on the embedded base and data: the chunked loss against logits that exist."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import spectune
from spectune.data import batches, collate, encode, load_rows
from spectune.deltas import Method, attach
from spectune.embedded import TRAIN
from spectune.methods import FullFineTuning, LoRA
from spectune.objectives import CAUSAL_LM
from spectune.training import TrainingConfig
from spectune.training.optimizer import MasterAdamW, learning_rate_at

STEPS, ROWS = 200, 4
CASES = pytest.mark.parametrize(("method", "rate"), [(LoRA(), 1e-3), (FullFineTuning(), 1e-4)], ids=["lora", "full"])


def rows_of(path: Path, count: int) -> list[dict[str, Any]]:
    with path.open() as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


def plain_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of all logits, as the model gives them."""
    keep, targets = batch["labels"][:, 1:] != -100, batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return F.cross_entropy(model(**inputs).logits[:, :-1][keep], targets[keep], reduction="sum")


@pytest.mark.slow
@CASES
def test_losses_and_gradients_are_equal_all_along_200_steps(method: Method, rate: float) -> None:
    """At the weights of every step, in float32. (Two runs of their own part whatever is computed: here a difference of
    1e-16 grows to 0.1 in 200 steps, in float64 throughout, as rounding decides ever more.)"""
    model, tokenizer = spectune.load("spectune-tiny", dtype="float32")
    trained = list(attach(model, method).parameters())
    examples = encode(load_rows(rows_of(TRAIN, STEPS * ROWS)), tokenizer, max_length=512).examples
    config = TrainingConfig(warmup_steps=10)
    optimizer = MasterAdamW(trained, config, rate)
    model.train()
    curve, of_loss, of_gradient = [], [], []
    for step, picked in enumerate(batches([1] * len(examples), ROWS, seed=0, epoch=0)):
        batch = collate([examples[i] for i in picked], 0)
        expected = plain_loss(model, batch)
        loss, count = CAUSAL_LM.loss_sum(model, batch)
        of_loss.append(abs(loss.item() / expected.item() - 1))
        (loss / count).backward()
        if step % 20 == 0:
            theirs = torch.cat([g.flatten() for g in torch.autograd.grad(expected / count, trained)])
            ours = torch.cat([p.grad.flatten() for p in trained])
            of_gradient.append(float((ours - theirs).norm() / theirs.norm()))
        optimizer.step(learning_rate_at(step, STEPS, rate, config), config.max_grad_norm, loss.detach())
        curve.append(loss.item() / count)
    print(f"{method.name}: {curve[0]:.3f} -> {curve[-1]:.3f}; largest difference of losses {max(of_loss):.1e}, "
          f"of gradients {max(of_gradient):.1e}")  # fmt: skip
    assert len(curve) == STEPS
    assert curve[-1] < 0.3 * curve[0]
    assert max(of_loss) <= 1e-5
    # this base has attention so sharp that float32 gradients of some weights are 10% off the float64 ones either way
    assert max(of_gradient) <= 1e-2
