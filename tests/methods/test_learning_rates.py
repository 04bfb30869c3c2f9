"""Every method says where a search has to look for its learning rate, and why."""

from __future__ import annotations

from typing import Any

import pytest

from spectune.methods import METHODS


@pytest.mark.parametrize("method", METHODS, ids=lambda m: str(m.model_fields["name"].default))
def test_the_default_lies_in_the_range_that_is_searched(method: Any) -> None:
    low, high = method.learning_rate_range
    assert low < method.default_learning_rate < high
    assert high / low >= 100  # bases of a few million and of many billion weights differ by as much
    assert method.learning_rate_range_source
