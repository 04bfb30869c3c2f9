"""The optimizer in its forms, held against torch's own clipping and AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectune.compute.dynamic_codes import BLOCK, codes_of, values_of
from spectune.compute.memory import AllocationTracker
from spectune.compute.step_groups import GROUP_BYTES, step_groups
from spectune.errors import ConfigError
from spectune.methods import FullFineTuning
from spectune.training import RunResult, TrainingConfig, train
from spectune.training.optimizers import make_optimizer
from tests.support import make_model, make_rows, make_tokenizer
from tests.training.test_training import QUIET

SHAPES = ((50, 70), (7,), (30, 30), (3, 3, 3), (96, 96), (96,))
RATE = 1e-2
LOSS = torch.ones(())


def weights(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], step: int, size: float = 1.0) -> list[Tensor | None]:
    """One weight has none in every other step."""
    generator = torch.Generator().manual_seed(100 + step)
    for index, parameter in enumerate(parameters):
        gradient = (size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
        parameter.grad = None if index == 2 and step % 2 else gradient
    return [p.grad if p.grad is None else p.grad.clone() for p in parameters]


def reference(parameters: list[nn.Parameter], decay: float) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    masters = [nn.Parameter(p.detach().float().clone()) for p in parameters]
    groups = [
        {"params": [m for m in masters if m.dim() > 1], "weight_decay": decay},
        {"params": [m for m in masters if m.dim() <= 1], "weight_decay": 0.0},
    ]
    return masters, torch.optim.AdamW(groups, lr=RATE, fused=True)


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipped_and_stepped_as_by_torch(dtype: torch.dtype, clip: float) -> None:
    """Bit for bit where weights are float32; the norm of lower ones is that of their float32 copies, up to rounding."""
    parameters = weights(dtype)
    config = TrainingConfig(weight_decay=0.1)
    optimizer = make_optimizer(parameters, config, RATE)
    masters, plain = reference(parameters, 0.1)
    for step in range(4):
        for master, gradient in zip(masters, give_gradients(parameters, step), strict=True):
            master.grad = None if gradient is None else gradient.float()
        norm = optimizer.step(RATE, clip, LOSS)
        expected = float(nn.utils.clip_grad_norm_(masters, clip or float("inf")))
        plain.step()
        if dtype == torch.float32:
            assert float(norm) == expected
        else:
            assert float(norm) == pytest.approx(expected, rel=1e-6)
        for ours, theirs, parameter in zip(optimizer.masters, masters, parameters, strict=True):
            if dtype == torch.float32:
                assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
            assert torch.equal(parameter, ours.to(dtype))
            assert parameter.grad is None
            assert ours.grad is None


def test_the_step_takes_16_bytes_a_weight() -> None:
    parameters = [nn.Parameter(torch.randn(64, 64).bfloat16()) for _ in range(40)]
    parameters.append(nn.Parameter(torch.randn(300, 64).bfloat16()))  # an embedding
    count = sum(p.numel() for p in parameters)
    optimizer = make_optimizer(parameters, TrainingConfig(), RATE)
    for _ in range(2):
        with AllocationTracker([*parameters, *optimizer.tensors()]) as tracker:
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, dtype=torch.float32).to(torch.bfloat16)
            optimizer.step(RATE, 1.0, LOSS)
    assert 16 * count < tracker.peak_bytes < 16.6 * count


@pytest.mark.parametrize("what", ["norm", "loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_what_is_not_finite_is_no_step(optim: str, dtype: torch.dtype, what: str) -> None:
    """The step after it is then as if it had never been asked for."""
    found = []
    for poisoned in (True, False):
        parameters = weights(dtype)
        optimizer = make_optimizer(parameters, TrainingConfig(optim=optim), RATE)
        for step in range(3):
            before = [p.detach().clone() for p in parameters]
            give_gradients(parameters, step)
            if step == 1:
                if not poisoned:
                    optimizer.clear()
                    continue
                if what == "norm":
                    assert parameters[0].grad is not None
                    parameters[0].grad[0, 0] = float("inf")
                norm = optimizer.step(RATE, 1.0, LOSS if what == "norm" else LOSS * float("inf"))
                assert bool(torch.isfinite(norm)) is (what == "loss")
                assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
                assert all(p.grad is None for p in parameters)
            else:
                optimizer.step(RATE, 1.0, LOSS)
        found.append([p.detach().clone() for p in parameters])
    # moments in eight bits are coded once more, which may round them
    room, rounding = (0.1 * RATE, 2.0**-7) if optim == "adamw_8bit" else (0.0, 0.0)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=rounding, atol=room)


def test_groups_are_small_and_large_weights_come_last() -> None:
    counts = [5, 1000, 7, 300, 299, 1]
    groups = step_groups(counts)
    assert sorted(index for group in groups for index in group) == list(range(6))
    assert groups[-1] == [1]
    order = [counts[index] for group in groups for index in group]
    assert order == sorted(order)
    assert step_groups([]) == []
    many = step_groups([10**7] * 1000)
    assert all(len(group) == GROUP_BYTES // (4 * 10**7) for group in many[:-1])


# -- in backward ----------------------------------------------------------------------------------------------------


def run(tmp_path: Path | None = None, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[RunResult, Any]:
    model = make_model(dtype=dtype)
    config = TrainingConfig(**{"max_steps": 4, "per_device_train_batch_size": 8, "load_best_at_end": False, **settings})
    rows = make_rows(32)
    return train(model, make_tokenizer(), FullFineTuning(), rows[:24], rows[24:], config, console=QUIET), model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stepping_in_backward_is_the_same_without_clipping(dtype: torch.dtype) -> None:
    found = [run(dtype=dtype, optim=optim, max_grad_norm=0.0) for optim in ("adamw_torch_fused", "adamw_in_backward")]
    (plain, one), (early, other) = found
    assert (plain.train_loss, plain.valid_loss) == (early.train_loss, early.valid_loss)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(p._post_accumulate_grad_hooks for p in other.parameters())  # the run's hooks are gone
    assert early.predicted_memory_bytes["gradients"] < plain.predicted_memory_bytes["gradients"]
    for result in (plain, early):
        measured = result.peak_memory_bytes["train_allocated"]
        assert result.predicted_memory_bytes["peak_allocated"] == pytest.approx(measured, rel=0.03)


def test_in_backward_reports_the_norm_and_leaves_out_what_is_not_finite() -> None:
    parameters = weights(torch.bfloat16)
    optimizer = make_optimizer(parameters, TrainingConfig(optim="adamw_in_backward", max_grad_norm=0), RATE)
    for poison in (False, True):
        before = [p.detach().clone() for p in parameters]
        factors = [torch.full_like(p, 0.5) for p in parameters]
        if poison:
            factors[1] = torch.full_like(parameters[1], float("nan"))
        optimizer.begin(RATE)
        sum((p * f).sum() for p, f in zip(parameters, factors, strict=True)).backward()  # type: ignore[union-attr]
        norm = optimizer.step(RATE, 0.0, LOSS)
        if poison:
            assert norm != norm
            assert torch.equal(parameters[1], before[1])
        else:
            assert float(norm) == pytest.approx(0.5 * sum(p.numel() for p in parameters) ** 0.5)
        assert not torch.equal(parameters[0], before[0])
        assert all(bool(p.isfinite().all()) and p.grad is None for p in parameters)
    optimizer.close()
    with pytest.raises(ConfigError, match="cannot clip"):
        optimizer.step(RATE, 1.0, LOSS)


def test_what_stepping_in_backward_excludes_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2.*Set gradient_accumulation_steps=1"):
        TrainingConfig(optim="adamw_in_backward", gradient_accumulation_steps=2, max_grad_norm=0)
    with pytest.raises(ValueError, match=r"max_grad_norm=1.*Set max_grad_norm=0"):
        TrainingConfig(optim="adamw_in_backward")
    with pytest.raises(ConfigError, match="there are 2"):
        make_optimizer(weights(torch.float32), TrainingConfig(optim="adamw_in_backward", max_grad_norm=0), RATE, 2)


# -- eight bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [BLOCK, 3 * BLOCK + 5])
def test_codes_are_close(count: int, signed: bool) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, count)
    values = values if signed else values.abs()
    codes, scales = codes_of(values, signed=signed)
    assert codes.dtype == torch.uint8
    assert codes.shape == (-(-count // BLOCK), BLOCK)
    found = values_of(codes, scales, values.shape, signed=signed)
    largest = scales.expand(-1, BLOCK).flatten()[:count]
    # between 0.1 and 1 of a block's largest the tree has 64 (signed) or 128 steps
    assert bool(((found - values).abs() <= 0.9 / (64 if signed else 128) / 2 * largest * 1.001).all())
    large = values.abs() > 0.01 * largest
    assert float(((found - values).abs() / values.abs())[large].max()) < 0.15
    assert bool((found[~large].abs() <= 0.02 * largest[~large]).all())
    assert torch.equal(values_of(*codes_of(torch.zeros(count), signed=signed), values.shape, signed=signed),
                       torch.zeros(count))  # fmt: skip


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11
def test_decoding_takes_eight_bytes_a_number() -> None:
    values = torch.randn(2**18)
    codes, scales = codes_of(values, signed=True)
    values_of(codes, scales, values.shape, signed=True)  # its levels are made once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = values_of(codes, scales, values.shape, signed=True)
    assert found.shape == values.shape
    made = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert made <= 8.01 * values.numel()  # int32 codes and float32 values, no int64 indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_moments_step_nearly_as_full_ones(dtype: torch.dtype) -> None:
    parameters = weights(dtype)
    start = [p.detach().float().clone() for p in parameters]
    optimizer = make_optimizer(parameters, TrainingConfig(optim="adamw_8bit"), RATE)
    masters, plain = reference(parameters, 0.0)
    for step in range(20):
        for master, gradient in zip(masters, give_gradients(parameters, step), strict=True):
            master.grad = None if gradient is None else gradient.float()
        optimizer.step(RATE, 1.0, LOSS)
        nn.utils.clip_grad_norm_(masters, 1.0)
        plain.step()
    for index, (ours, theirs, first) in enumerate(zip(optimizer.masters, masters, start, strict=True)):
        way, apart = (theirs - first).norm(), (ours - theirs).norm()
        assert apart < 0.05 * way, index
        assert (apart == 0) == (ours.numel() < 4096), index
    held = sum(t.numel() * t.element_size() for t in optimizer.tensors())
    large = 96 * 96
    assert large in {p.numel() for p in parameters}
    small = sum(p.numel() for p in parameters) - large
    lower = 4 if dtype == torch.bfloat16 else 0
    assert held == (2 + lower) * large + 2 * 4 * large // BLOCK + (8 + lower) * small + 4 * len(parameters)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "adamw_in_backward"])
def test_stopped_and_resumed_bit_for_bit(optim: str, tmp_path: Path) -> None:
    clip = 0.0 if optim == "adamw_in_backward" else 1.0
    settings: dict[str, Any] = {"optim": optim, "max_grad_norm": clip, "save_steps": 2, "eval_steps": 2}
    whole, model = run(dtype=torch.bfloat16, **settings)
    folder = tmp_path / "run"
    run(dtype=torch.bfloat16, output_dir=folder, **settings)
    (folder / "result.json").unlink()
    result, resumed = run(dtype=torch.bfloat16, output_dir=folder, resume=True, **settings)
    assert (result.train_loss, result.valid_loss) == (whole.train_loss, whole.valid_loss)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
