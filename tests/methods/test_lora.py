"""LoRA's settings that a stranger may have written."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from spectune.methods import LoRA


def test_patterns_that_could_hang_or_do_not_compile_are_refused() -> None:
    for pattern in ("([a-z]+)*([a-z.0-9_]+)+!", "(", "x" * 501):
        for field, value in (("target_modules", pattern), ("rank_pattern", {pattern: 2})):
            with pytest.raises(ValidationError, match=r"could hang|no regular expression"):
                LoRA(**{field: value})
    assert LoRA(target_modules=r".*\.(q|v)_proj").target_modules == r".*\.(q|v)_proj"


def test_numbers_must_be_finite() -> None:
    with pytest.raises(ValidationError):
        LoRA(lora_alpha=math.inf)
