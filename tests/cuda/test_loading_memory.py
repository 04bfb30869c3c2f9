"""A base that has no room on the device is one sentence with its size, and exit code 5."""

from __future__ import annotations

import pytest
import torch

from spectune.errors import OutOfMemoryError
from spectune.storage import load

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("precision", [None, "int8"])
def test_a_base_without_room_on_the_device_is_said(precision: str | None) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        with pytest.raises(OutOfMemoryError, match=r"GiB in .*cuda.*out of memory.*--dtype bfloat16") as caught:
            load("spectune-tiny", device="cuda", base_precision=precision)
        assert caught.value.exit_code == 5
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
