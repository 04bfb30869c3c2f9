"""How a model runs where nothing is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from spectune.compute.cudnn import cudnn_attention


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradient, and no kernel that is made for each new shape; afterwards each module is in the mode it
    was in, as callers may mix them.

    Not `torch.inference_mode`: a buffer that a model renews inside it could not be used in training any more.
    """
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), cudnn_attention(False):
            yield
    finally:
        for module in in_training:
            module.training = True
