"""One step of several runs' optimizers, held against each run's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from spectune.training import TrainingConfig
from spectune.training.joint_step import AskedStep, step_together
from spectune.training.optimizer import MasterAdamW
from spectune.training.optimizers import make_optimizer
from tests.training.test_optimizer import give_gradients, weights

#: of each run: its settings, what the rates of its weights are multiplied with, its rate and its clipping
RUNS = (
    (TrainingConfig(weight_decay=0.1), (), 1e-2, 1.0),
    (TrainingConfig(), (1.0, 1.0, 16.0, 1.0, 16.0, 1.0), 3e-3, 0.0),
    (TrainingConfig(adam_beta2=0.95, adam_epsilon=1e-6), (), 5e-4, 1e6),
    (TrainingConfig(optim="adamw_8bit"), (), 1e-3, 0.5),
)


def optimizers(dtype: torch.dtype = torch.float32) -> list[MasterAdamW]:
    return [
        make_optimizer(weights(dtype, seed), config, rate, factors=factors)
        for seed, (config, factors, rate, _) in enumerate(RUNS)
    ]


def asked(made: list[MasterAdamW], step: int, losses: dict[int, float] | None = None) -> list[AskedStep]:
    """A step of each with gradients, a rate that falls and a loss."""
    found = []
    for number, (optimizer, (_, _, rate, clip)) in enumerate(zip(made, RUNS, strict=True)):
        give_gradients([p for p in optimizer.parameters if isinstance(p, nn.Parameter)], step + 7 * number)
        loss = torch.tensor((losses or {}).get(number, 1.0))
        found.append(AskedStep(optimizer, rate / (1 + step), clip, loss))
    return found


def check_same(ours: list[MasterAdamW], theirs: list[MasterAdamW]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one.parameters, other.parameters, strict=True):
            assert torch.equal(a, b)
            assert a.grad is None
        states = one.state_dict(), other.state_dict()
        assert set(states[0]) == set(states[1])
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]), name


def each_alone(steps: list[AskedStep]) -> list[Tensor]:
    return [one.optimizer.step(one.rate, one.max_grad_norm, one.loss) for one in steps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_many_runs_is_each_runs_own_to_the_last_bit(dtype: torch.dtype) -> None:
    """Of unlike rates, clipping, moments and forms; weights without a gradient in some steps, runs that sit out."""
    ours, theirs = optimizers(dtype), optimizers(dtype)
    for step in range(5):
        taking = [n for n in range(len(RUNS)) if step != 3 or n != 1]
        norms = step_together([one for n, one in enumerate(asked(ours, step)) if n in taking])
        expected = each_alone([one for n, one in enumerate(asked(theirs, step)) if n in taking])
        assert all(torch.equal(a, b) for a, b in zip(norms, expected, strict=True))
        for optimizer in (*ours, *theirs):  # of who sat out
            optimizer.clear()
        check_same(ours, theirs)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1.0])
def test_a_run_that_is_not_finite_takes_no_step_and_the_others_do(loss: float) -> None:
    ours, theirs = optimizers(), optimizers()
    for step in range(3):
        steps = [asked(made, step, {1: loss} if step == 1 else None) for made in (ours, theirs)]
        if step == 1 and loss == 1.0:
            for found in steps:
                gradient = found[1].optimizer.parameters[0].grad
                assert gradient is not None
                gradient[0, 0] = float("nan")
        before = copy.deepcopy(list(ours[1].parameters))
        norms = step_together(steps[0])
        each_alone(steps[1])
        check_same(ours, theirs)
        if step == 1:
            assert all(torch.equal(a, b) for a, b in zip(ours[1].parameters, before, strict=True))
            assert [bool(norm.isfinite()) for norm in norms] == [True, loss != 1.0, True, True]


def test_a_step_goes_on_from_states_that_were_loaded_and_without_a_loss() -> None:
    ours, theirs = optimizers(), optimizers()
    for step in range(2):
        step_together(asked(ours, step))
        each_alone(asked(theirs, step))
    again = optimizers()
    for one, other in zip(again, ours, strict=True):
        one.load_state_dict(other.state_dict())
        with torch.no_grad():
            for a, b in zip(one.parameters, other.parameters, strict=True):
                a.copy_(b)
    steps = [AskedStep(s.optimizer, s.rate, s.max_grad_norm) for s in asked(again, 2)]
    step_together(steps)
    each_alone(asked(theirs, 2))
    check_same(again, theirs)


def test_runs_without_a_gradient_have_the_norm_0() -> None:
    made = optimizers()
    steps = [AskedStep(optimizer, 1e-3, 1.0) for optimizer in made]
    assert [float(norm) for norm in step_together(steps)] == [0.0] * len(RUNS)
    assert step_together([]) == []
