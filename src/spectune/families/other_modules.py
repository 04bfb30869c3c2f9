"""Modules that no delta of linears acts at, and that a name given for linears may mean too."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class OtherModule:
    """A module outside of the linears that are adapted.

    Attributes:
        of_text: text goes through it (the head, the embeddings, a projection beside the layers); else it is of another
            tower, or of cross-attention.
        has_matrix: it holds a matrix of its own, which other libraries adapt where a name matches.
    """

    path: str
    of_text: bool
    has_matrix: bool


def other_modules(model: PreTrainedModel, linears: Iterable[str], beside: frozenset[str]) -> tuple[OtherModule, ...]:
    """Every module that has a matrix or is called as one of the linears is, these left out, in the model's order."""
    adapted = set(linears)
    endings = {path.rpartition(".")[2] for path in adapted}
    return tuple(
        OtherModule(path, path not in beside, matrix)
        for path, module in model.named_modules()
        if path and path not in adapted
        if (matrix := _has_matrix(module)) or path.rpartition(".")[2] in endings
    )


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() > 1
