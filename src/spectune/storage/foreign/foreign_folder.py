"""What is understood of another program's folder on one base."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from spectune.deltas import Method
from spectune.deltas.folder import WEIGHTS_FILE

Tensors = Mapping[str, Tensor]


def as_they_are(tensors: Tensors) -> dict[str, Tensor]:
    return dict(tensors)


@dataclass(frozen=True)
class ForeignFolder:
    """A folder of another program, as a method of ours.

    Attributes:
        method: on this base.
        weights: the name of its file of weights.
        translate: from its tensors to those of PEFT's layout, which `Method.from_folder` reads; works on meta tensors.
        said: what the user should know, or None.
    """

    method: Method
    weights: str = WEIGHTS_FILE
    translate: Callable[[Tensors], dict[str, Tensor]] = as_they_are
    said: str | None = None
