"""How a model runs where nothing is trained: no gradient, and no kernel that is made for each new shape.

Not `torch.inference_mode`: a buffer that a model renews inside it could not be used in training any more.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from spectune.compute.cudnn import cudnn_attention


def evaluating(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> AbstractContextManager[None]:
    """Run `model` in evaluation mode and without gradients inside. Afterwards each module is in the mode it was in.

    Args:
        modules: those of the model that will run; None is all of them.
    """
    return _in_mode(model.modules() if modules is None else modules, training=False)


@contextlib.contextmanager
def rehearsing(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run `model` in training mode, dropout included, and without gradients inside. Afterwards modes and random state
    (the device's too) are restored."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _in_mode(model.modules(), training=True):
        yield


@contextlib.contextmanager
def _in_mode(modules: Iterable[nn.Module], *, training: bool) -> Iterator[None]:
    others = [module for module in modules if module.training is not training]
    try:
        for module in others:
            module.training = training
        with torch.no_grad(), cudnn_attention(False):
            yield
    finally:
        for module in others:
            module.training = not training
