"""Memory that runs out without gradient: the batch is halved and done again, and that is said."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from spectune.errors import OutOfMemoryError

log = logging.getLogger("spectune")

T = TypeVar("T")
_SIGNS = ("not enough memory", "can't allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that memory, the device's or the host's, did not suffice."""
    if isinstance(error, RuntimeError):
        return any(sign in str(error) for sign in _SIGNS)
    return isinstance(error, MemoryError)


def halving(work: Callable[[int], T], batch_size: int, doing: str) -> T:
    """`work(batch_size)`; where memory runs out, all of it again with half the rows, down to one. Each try is logged.

    Args:
        doing: what it is, after "out of memory while": "writing 64 rows".

    Raises:
        OutOfMemoryError: one row at a time is too much.
    """
    while True:
        try:
            return work(batch_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch_size <= 1:
                raise OutOfMemoryError(
                    f"out of memory while {doing}, one row at a time. Try a smaller max_length or max_new_tokens, a "
                    "smaller dtype, or another device."
                ) from error
        # here and not above: the error's traceback holds the tensors that did not fit
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory while %s in batches of %d; again with %d", doing, batch_size, batch_size // 2)
        batch_size //= 2
