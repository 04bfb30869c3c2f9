"""Inside one layer: which outputs of attention's linears make keys and values, and where the nonlinearity stands."""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.activations import ACT2CLS

from spectune.families.module_kinds import linear_shape

# some entries are a class with its arguments
_ACTIVATIONS: tuple[Any, ...] = tuple(entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values())


@dataclass(frozen=True)
class Slice:
    """The outputs `start` to `start + size` of the linear at `path`, which has `out_features` of them."""

    path: str
    start: int
    size: int
    out_features: int


def projections(
    attention: nn.Module, path: str, query_size: int, key_size: int
) -> tuple[Slice, Slice] | tuple[None, None]:
    """The slices that make keys and values, as names and shapes tell; a caller who builds on them checks by running.

    A linear of its own for each is recognised by a word of its name (k or key, v or value) and its size. Otherwise one
    linear as wide as queries, keys and values together is taken to be these three one after the other."""
    linears = {name: shape[1] for name, child in attention.named_modules() if (shape := linear_shape(child))}
    found = {}
    for role, words in (("keys", {"k", "key", "keys"}), ("values", {"v", "value", "values"})):
        named = [n for n, size in linears.items() if size == key_size and words & set(re.split(r"[._]", n))]
        if len(named) == 1:
            found[role] = Slice(f"{path}.{named[0]}", 0, key_size, key_size)
    if len(found) == 2:
        return found["keys"], found["values"]
    whole = query_size + 2 * key_size
    fused = [name for name, size in linears.items() if size == whole]
    if len(fused) != 1:
        return None, None
    where = f"{path}.{fused[0]}"
    return Slice(where, query_size, key_size, whole), Slice(where, query_size + key_size, key_size, whole)


def inner_activation(block: nn.Module) -> tuple[str | None, int]:
    """The one nonlinearity among the children of a block of linears, and the features that it gives: those that the
    block's last linear takes. `(None, 0)` where there is not exactly one beside at least two linears."""
    shapes = [shape for child in block.children() if (shape := linear_shape(child)) is not None]
    names = [name for name, child in block.named_children() if isinstance(child, _ACTIVATIONS)]
    if len(shapes) < 2 or len(names) != 1:
        return None, 0
    return names[0], shapes[-1][0]


def reader_of_inner(block: nn.Module, activation: str | None) -> str | None:
    """The last linear of a block whose other children are linears, its nonlinearity and dropout: it then takes what the
    nonlinearity gives, alone or times a gate's, and scaling the one is scaling the other."""
    children = dict(block.named_children())
    linears = [name for name, child in children.items() if linear_shape(child) is not None]
    rest = [child for name, child in children.items() if name not in (*linears, activation)]
    if activation is None or any(not isinstance(child, nn.Dropout | nn.Identity) for child in rest):
        return None
    return linears[-1]
