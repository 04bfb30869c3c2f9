"""Every type over int8: its logits are those of the base with the decoded weights, or it is refused in words."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from benchmarks.coverage.bases import LENGTH, BaseFailsError, all_types, logits, make, tokens
from benchmarks.coverage.bases import measure as bare
from benchmarks.coverage.checks import METHODS
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectune.compute.frozen import FrozenLinear
from spectune.deltas import attach, detach
from spectune.errors import ConfigError, SpectuneError
from spectune.families import describe
from spectune.objectives import CAUSAL_LM
from spectune.storage import quantise_base


def quantised(model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy over int8, and `model` with the weights that this stands for; None where it is refused."""
    few = copy.deepcopy(model)
    try:
        linears = describe(model).linears
        quantise_base(few, "int8")
    except ConfigError:
        return None
    for linear in linears:
        stored = few.get_submodule(linear.path)
        if isinstance(stored, FrozenLinear):
            own = model.get_submodule(linear.path)
            own.weight.data = stored.dequantised().T.contiguous() if isinstance(own, Conv1D) else stored.dequantised()
    return few


def hold(model_type: str, cases: tuple[str, ...]) -> None:
    model = make(model_type)
    few = quantised(model)
    if few is None:
        return
    ids = tokens(2, LENGTH)
    expected = logits(model, ids)
    assert torch.allclose(logits(few, ids), expected, atol=1e-4 * max(1.0, float(expected.abs().max())))
    before = logits(few, ids)
    for case in cases:
        if METHODS[case].trains_base:
            continue
        try:
            delta = attach(few, METHODS[case], case)
        except SpectuneError:
            continue  # as over the plain base: tests/coverage/test_types.py
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        CAUSAL_LM.loss_sum(few, batch)[0].backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in delta.parameters()), case
        detach(few, case)
        assert torch.equal(logits(few, ids), before), case


def test_linears_that_are_used_by_their_weight_stay_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = make("mamba")
    with caplog.at_level(logging.WARNING, logger="spectune"):
        quantise_base(model, "int8")
    layer = describe(model).layers[0].path
    assert not isinstance(model.get_submodule(f"{layer}.mixer.dt_proj"), FrozenLinear)
    assert isinstance(model.get_submodule(f"{layer}.mixer.in_proj"), FrozenLinear)
    assert f"{layer}.mixer.dt_proj" in caplog.text


@pytest.mark.parametrize("model_type", [t for t in ("mamba", "longcat_flash") if t in all_types()])
def test_types_with_such_linears(model_type: str) -> None:
    hold(model_type, ("lora", "bitfit", "adapter"))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", all_types())
def test_every_type(model_type: str) -> None:
    try:
        bare(model_type)
    except BaseFailsError as error:
        pytest.skip(f"the bare base does not run: {error}")
    hold(model_type, tuple(METHODS))
