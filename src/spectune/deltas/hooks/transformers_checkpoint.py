"""transformers' own gradient checkpointing recomputes with the route of its forward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_FUNCTION = "_gradient_checkpointing_func"
#: makes of a function one that runs with what is in force now, whenever it is called
Keeping = Callable[[Callable[..., Any]], Callable[..., Any]]


class CheckpointHook:
    """Puts itself around the checkpoint functions of a base, wherever backward is called from.

    Checkpointing may be switched on after attach, so `keep` looks at each pass in training. `modules`: those of the
    base that transformers can checkpoint. `keeping`: see `Keeping`."""

    def __init__(self, modules: Sequence[nn.Module], keeping: Keeping) -> None:
        self.modules = [module for module in modules if hasattr(module, "gradient_checkpointing")]
        self.keeping = keeping

    def keep(self) -> None:
        """Look whether checkpointing was switched on since the last pass."""
        if not torch.is_grad_enabled():
            return
        for module in self.modules:
            checkpoint = module.__dict__.get(_FUNCTION)
            if checkpoint is not None and not isinstance(checkpoint, _KeepingCheckpoint):
                module.__dict__[_FUNCTION] = _KeepingCheckpoint(checkpoint, self.keeping)

    def close(self) -> None:
        for module in self.modules:
            checkpoint = module.__dict__.get(_FUNCTION)
            if isinstance(checkpoint, _KeepingCheckpoint):
                module.__dict__[_FUNCTION] = checkpoint.original


class _KeepingCheckpoint:
    """A checkpoint function that remembers what was in force when the forward pass ran."""

    def __init__(self, original: Callable[..., Any], keeping: Keeping) -> None:
        self.original, self.keeping = original, keeping

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.original(self.keeping(function), *args, **kwargs)
