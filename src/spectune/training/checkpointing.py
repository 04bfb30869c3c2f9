"""Gradient (activation) checkpointing: which way of it a run takes. How each is done: `spectune.deltas.checkpointing`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from spectune.deltas.checkpointing import Recomputation, offload_needs_cuda, recomputing
from spectune.errors import ConfigError

__all__ = ["Recomputation", "WORDS", "memory_budget", "modes", "recomputing"]

#: from the fastest to the leanest
ORDER: tuple[Recomputation, ...] = (False, "selective", True, "offload")
WORDS: dict[Recomputation, str] = {
    False: "nothing is recomputed",
    "selective": "all but matrix products and attention is recomputed (selective)",
    True: "every block is recomputed (true)",
    "offload": "every block is recomputed, its input kept in host memory (offload)",
}


def modes(wanted: Any, model: PreTrainedModel) -> tuple[Recomputation, ...]:
    """What a run may take, in the order in which it is tried: the one that is wanted, or all of them for "auto".

    A model on which the user has switched transformers' own checkpointing on is recomputed at least block by block.

    Raises:
        ConfigError: "offload" on a model that is not on a CUDA device.
    """
    cuda = model.device.type == "cuda"
    if wanted == "offload" and not cuda:
        raise ConfigError(offload_needs_cuda(model.device.type))
    is_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if wanted == "auto":
        possible = ORDER if cuda else ORDER[:-1]
        return possible[possible.index(True) :] if is_on else possible
    return (True,) if wanted is False and is_on else (wanted,)


def memory_budget(mode: Recomputation) -> float:
    """What compiled blocks are given as `torch._functorch.config.activation_memory_budget`, from 0 (a block's input
    alone is kept) to 1 (what the partitioner keeps by itself, recomputing pointwise operations where it is free).

    Selective recomputation is the compiler's alone, so `recomputing` leaves compiled blocks to it; whole blocks are
    recomputed around the compiled call, in which the budget is then nobody's.
    """
    return 0.5 if mode == "selective" else 1.0
