"""States that are taken for a while and given back exactly: the random state, generation defaults."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of `seed` inside; afterwards the random state, the device's too, is what it was."""
    on_mps = device.type == "mps"
    mps_state = torch.mps.get_rng_state() if on_mps else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)


def wait_for(device: torch.device) -> None:
    """Return when all work that was given to the device is done: what a clock has to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def generation_defaults(model: PreTrainedModel) -> Iterator[None]:
    """An empty generation config in place of the model's own: `generate` fills every unset field from there (a
    checkpoint's sampling temperature, its repetition penalty, its stop tokens), so that two bases would be measured
    by different rules."""
    empty: Any = GenerationConfig  # untyped in transformers
    before = model.generation_config
    model.generation_config = empty()
    # transformers drops a mask of ones itself, and then warns that a batch which begins with BOS = PAD has no mask
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_about_no_mask)
    try:
        yield
    finally:
        logger.removeFilter(_about_no_mask)
        model.generation_config = before


def _about_no_mask(record: logging.LogRecord) -> bool:
    return "passing in an `attention_mask`" not in record.getMessage()
