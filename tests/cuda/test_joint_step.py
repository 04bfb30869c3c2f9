"""One optimizer step of several runs on a CUDA device, held against each run's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectune.training import TrainingConfig
from spectune.training.joint_step import AskedStep, step_together
from spectune.training.optimizer import MasterAdamW

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Synchronization debug mode")]
SHAPES = ((50, 70), (7,), (3, 3, 3), (300, 64))
RUNS = ((1e-2, 1.0), (3e-3, 0.0), (5e-4, 1e-3))


def made() -> list[MasterAdamW]:
    found = []
    for number, (rate, _) in enumerate(RUNS):
        generator = torch.Generator().manual_seed(number)
        weights = [nn.Parameter(torch.randn(*shape, generator=generator).cuda()) for shape in SHAPES]
        found.append(MasterAdamW(weights, TrainingConfig(weight_decay=0.1), rate))
    return found


def asked(optimizers: list[MasterAdamW], step: int) -> list[AskedStep]:
    found = []
    for number, (optimizer, (rate, clip)) in enumerate(zip(optimizers, RUNS, strict=True)):
        generator = torch.Generator().manual_seed(100 * step + number)
        for parameter in optimizer.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
        loss = torch.tensor(float("nan") if (step, number) == (2, 1) else 1.0, device="cuda")
        found.append(AskedStep(optimizer, rate, clip, loss))
    return found


def test_a_step_of_many_runs_is_each_runs_own_and_nothing_waits() -> None:
    ours, theirs = made(), made()
    for step in range(5):
        given = asked(ours, step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            norms = step_together(given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for one, norm in zip(asked(theirs, step), norms, strict=True):
            assert torch.equal(one.optimizer.step(one.rate, one.max_grad_norm, one.loss), norm)
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one.parameters, other.parameters, strict=True):
            assert torch.equal(a, b)
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name])
