"""Compiled decoder blocks for as long as a run takes: each block is one graph, all blocks of a kind share it.

The whole model as one graph would take minutes to compile and gain little more; a block is compiled once for each kind
(twice where nothing below the first block is trained, whose input then needs no gradient). Deltas stand inside: their
hooks are part of the block's call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import PreTrainedModel

from spectune.blocks.compiler import CompiledCall, block_of, compiler_settings
from spectune.families import Family


@contextlib.contextmanager
def compiled(
    model: PreTrainedModel,
    family: Family,
    wanted: bool,
    *,
    backend: str | Callable[..., Any] = "inductor",
    memory_budget: float = 1.0,
) -> Iterator[None]:
    """Inside the `with`, run each decoder block compiled while gradients are wanted; leave the model as it was.

    Without gradients (validation, generation) blocks run as they are: their shapes vary, and they would be compiled
    once more.

    Args:
        wanted: False does nothing.
        backend: of `torch.compile`.
        memory_budget: 1 keeps what a product or attention gave and recomputes what is cheap (norms, activations,
            casts); below 1 the compiler recomputes products too, until a block keeps about that share of it. See
            `spectune.training.checkpointing.memory_budget`; `recomputing` is to be entered after this.
    """
    if not wanted:
        yield
        return
    run = torch.compile(block_of(), backend=backend)
    layers = [model.get_submodule(layer.path) for layer in family.layers]
    for layer in layers:
        layer.__dict__["_compiled_call_impl"] = _Compiled(layer, run, memory_budget)
    try:
        with compiler_settings(memory_budget):
            yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_compiled_call_impl", None)


class _Compiled(CompiledCall):
    """The call of one layer, compiled while gradients are wanted."""

    def __init__(self, layer: nn.Module, run: Callable[..., Any], memory_budget: float) -> None:
        self.layer, self.run, self.memory_budget = layer, run, memory_budget

    def compiles(self) -> bool:
        # where tensors are counted one by one (on a CPU, in the first steps), the compiler would give up for good
        return torch.is_grad_enabled() and _get_current_dispatch_mode() is None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiles():
            return self.run(self.layer, args, kwargs)
        return self.layer._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
