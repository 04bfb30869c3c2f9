"""The planner against real steps: every method on every family, tensors counted one by one on the CPU."""

from __future__ import annotations

import pytest

from spectune.deltas import attach
from spectune.errors import ConfigError
from spectune.methods import METHODS, method_from_name
from spectune.planning import plan
from tests.contract.families import FAMILIES, VOCABULARY
from tests.planning.steps import batch, real_peak


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", [m.model_fields["name"].default for m in METHODS])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_method_on_every_family(family: str, method: str, checkpointing: bool) -> None:
    model = FAMILIES[family]()
    try:
        delta = attach(FAMILIES[family](), method_from_name(method))
    except ConfigError:
        pytest.skip("the method refuses this family")
    estimate = plan(model, method, 4, 40, device="cpu", gradient_checkpointing=checkpointing)
    model = delta.model
    measured = real_peak(model, delta, batch(4, 40, VOCABULARY), checkpointing=checkpointing)
    assert estimate.peak_allocated == pytest.approx(measured, rel=0.05)
