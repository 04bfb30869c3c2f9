"""Gradient (activation) checkpointing: which way of it a run takes. How it is done: `spectune.blocks.recompute`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from spectune.blocks import compile as compiler
from spectune.blocks.recompute import Recomputation, modes, recomputing

__all__ = ["WORDS", "Recomputation", "memory_budget", "modes_of", "recomputing"]

WORDS: dict[Recomputation, str] = {
    False: "nothing is recomputed",
    "selective": "all but matrix products and attention is recomputed (selective)",
    True: "every block is recomputed (true)",
    "offload": "every block is recomputed, its input kept in host memory (offload)",
}


def modes_of(model: PreTrainedModel, wanted: Any) -> tuple[Recomputation, ...]:
    """What a run on this model may do, in the order in which it is tried: the one that is wanted, or all for "auto".

    A model on which the user has switched transformers' own checkpointing on is recomputed at least block by block.

    Raises:
        ConfigError: "offload" on a model that is not on a CUDA device.
    """
    found = modes(wanted, model.device.type)
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return found
    return found[found.index(True) :] if wanted == "auto" else (True,) if wanted is False else found


def memory_budget(mode: Recomputation) -> float:
    """What compiled blocks are given of the compiler's budget: see `spectune.blocks.compile.memory_budget`."""
    return compiler.memory_budget(mode)
