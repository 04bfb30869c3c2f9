"""A tracer keeps what operations made of such tensors; a plan must not see it."""

from __future__ import annotations

import pytest

from spectune.deltas import Method
from spectune.methods import METHODS, FullFineTuning, LoRA, PrefixTuning
from spectune.planning import plan, tracer
from tests.support.quick import others_slow


@pytest.mark.parametrize("method", others_slow(METHODS, (FullFineTuning, PrefixTuning, LoRA)))
def test_a_plan_is_the_same_whether_an_operation_was_met_before(
    method: type[Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"batch": 3, "length": 40, "device": "cpu", "gradient_checkpointing": False}
    found = plan("spectune-tiny", method(), **asked)
    monkeypatch.setattr(tracer._Known, "call", lambda self, func, args, kwargs: func(*args, **kwargs))
    expected = plan("spectune-tiny", method(), **asked)
    assert found == expected
    assert found.source == expected.source
