"""Retry inference with half the batch where memory runs out, and log it."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from spectune.errors import OutOfMemoryError, is_out_of_memory

log = logging.getLogger("spectune")

T = TypeVar("T")


def halving(work: Callable[[int], T], batch_size: int, doing: str) -> T:
    """Call `work(batch_size)`, and again with half the batch size each time that memory runs out, down to one row.
    Each retry is logged.

    Args:
        doing: describes the work after "out of memory while", such as "writing 64 rows".

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
