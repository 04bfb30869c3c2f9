"""LoRA's settings that a stranger may have written."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from spectune.methods import LoRA


def test_numbers_must_be_finite() -> None:
    with pytest.raises(ValidationError):
        LoRA(lora_alpha=math.inf)
