"""Matrices that stand in a parameter of their own and in no linear: routers, and experts, all in one parameter."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from spectune.families.module_kinds import linear_shape
from spectune.families.quantised import is_plain


@dataclass(frozen=True)
class Matrix:
    """A parameter of a layer that is a matrix, or one for each expert, and no linear's weight: the base's own code
    multiplies with it, so that no hook on a linear's output reaches it.

    Attributes:
        path: the module that holds it.
        name: its name there.
        shape: two numbers, or three where each expert has a matrix.
        transposed: it is `[in, out]` for each expert, as the module itself says (`is_transposed`). One that says
            nothing counts as `[out, in]`, as in PEFT; a low-rank change is the same either way.
        experts: it is experts'.
        per_token: matrices in it that one token goes through; all of them where the model does not tell (`top_k`).
    """

    path: str
    name: str
    shape: tuple[int, ...]
    transposed: bool
    experts: bool
    per_token: int

    @property
    def where(self) -> str:
        return f"{self.path}.{self.name}"

    @property
    def count(self) -> int:
        """Matrices in it."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def in_features(self) -> int:
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def out_features(self) -> int:
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def size(self) -> int:
        return self.count * self.in_features * self.out_features


def matrices_of(model: PreTrainedModel, stacks: list[str], beside: frozenset[str]) -> tuple[Matrix, ...]:
    """Every parameter of two or three dimensions in the layers, in the model's order; those of linears, convolutions
    and tables, quantised ones and biases are left out."""
    found = []
    chosen = [k for path in stacks for module in model.get_submodule(path).modules() if (k := _top_k(module))]
    for path in stacks:
        for name, module in model.get_submodule(path).named_modules():
            where = f"{path}.{name}"
            if where in beside or isinstance(module, nn.modules.conv._ConvNd | nn.Embedding):
                continue
            linear = linear_shape(module) is not None
            for leaf, parameter in module.named_parameters(recurse=False):
                weight = linear and leaf == "weight"
                if parameter.dim() in (2, 3) and is_plain(parameter) and not weight and not leaf.endswith("bias"):
                    found.append(_matrix(module, where, name, leaf, parameter, min(chosen, default=None)))
    return tuple(found)


def _top_k(module: nn.Module) -> int | None:
    """Experts that a router chooses for each token."""
    found = getattr(module, "top_k", None)
    return found if type(found) is int and found > 0 else None


def _matrix(
    module: nn.Module, where: str, inside: str, leaf: str, parameter: nn.Parameter, chosen: int | None
) -> Matrix:
    """Experts are told by the number of them that their module knows, or by the name of what holds them. A router knows
    that number too, and has a row for each."""
    several = getattr(module, "num_experts", None) == parameter.shape[0]
    named = "expert" in inside
    experts = (several or named) if parameter.dim() == 3 else (named and not several)
    transposed = parameter.dim() == 3 and getattr(module, "is_transposed", False) is True
    count = parameter.shape[0] if parameter.dim() == 3 else 1
    per_token = min(count, chosen) if experts and chosen is not None else count
    return Matrix(where, leaf, tuple(parameter.shape), transposed, experts, per_token)
