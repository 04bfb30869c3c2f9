"""The normalisations of a base that text goes through."""

import inspect
import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from spectune.families.module_kinds import is_norm

_NAMES = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Norm:
    """A normalisation.

    Attributes:
        path: the module.
        size: length of each of its parameters.
        parameters: their names, "weight" first.
        alone: it takes the tensor that it normalises and nothing else (some take a gate, too).
    """

    path: str
    size: int
    parameters: tuple[str, ...]
    alone: bool


def norms_of(model: PreTrainedModel, decoder: str, beside: frozenset[str]) -> tuple[Norm, ...]:
    """Every normalisation of the decoder that has trainable vectors and nothing else (no running averages)."""
    found = []
    for name, module in model.get_submodule(decoder).named_modules():
        path = ".".join(part for part in (decoder, name) if part)
        if path in beside or not is_norm(module) or not _is_called_so(name, module):
            continue
        own = dict(module.named_parameters(recurse=False))
        size = own["weight"].numel()
        if all(p.shape == (size,) for p in own.values()) and not any(True for _ in module.buffers(recurse=False)):
            takes = list(inspect.signature(type(module).forward).parameters)
            found.append(Norm(path, size, tuple(own), len(takes) == 2))  # self and the tensor
    return tuple(found)


def _is_called_so(path: str, module: nn.Module) -> bool:
    return any(_NAMES.search(name) for name in (type(module).__name__, path.rpartition(".")[2]))
