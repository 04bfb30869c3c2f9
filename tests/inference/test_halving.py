from __future__ import annotations

import pytest

from spectune.errors import OutOfMemoryError, is_out_of_memory
from spectune.inference import halving


def test_halves_down_to_one_then_gives_up() -> None:
    tried = []

    def never(size: int) -> None:
        tried.append(size)
        raise MemoryError

    with pytest.raises(OutOfMemoryError, match="out of memory while writing 3 rows, one row at a time"):
        halving(never, 12, "writing 3 rows")
    assert tried == [12, 6, 3, 1]


def test_other_errors_are_not_memory() -> None:
    def wrong(size: int) -> None:
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({size})")

    with pytest.raises(RuntimeError, match=r"\(8\)"):
        halving(wrong, 8, "writing")
    assert not is_out_of_memory(ValueError("out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
