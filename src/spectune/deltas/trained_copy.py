"""A copy of one of the base's own modules that is trained in its place: a head, a norm."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectune.deltas.modules import OutputModule
from spectune.deltas.rate_rule import RatePoint, RateRule
from spectune.deltas.site import OutputSite
from spectune.errors import ConfigError
from spectune.families import Family
from spectune.families.quantised import is_plain

#: the highest rate of a head beside a delta: a matrix does not bear the rates of vectors (prompt tuning's is 0.12 where
#: this is 0.007)
_HEAD_RATES = RateRule((
    RatePoint(448, 7e-3, "LoRA's rates", strong=False),
    RatePoint(2048, 1e-3, "LoRA's rates", strong=False),
    RatePoint(4096, 3e-4, "LoRA's rates", strong=False),
))  # fmt: skip


@dataclass(frozen=True)
class CopySite(OutputSite):
    """After a module of the base that is copied.

    Attributes:
        shapes: its own parameters' names and shapes, in its order.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, path: str, module: nn.Module) -> "CopySite":
        """The site of the module at `path`. Raises ConfigError: it has no parameters of its own, or other modules in
        it, which would have to be copied too."""
        shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False))
        if not shapes or any(name != "deltas" for name, _ in module.named_children()):
            raise ConfigError(
                f"{path} ({type(module).__name__}) cannot be trained as a copy: expected a module with parameters of "
                "its own and no other module in it"
            )
        # a vector acts on features of its size; a matrix maps its last dimension to its first, or the other way round
        sizes = next(shape for _, shape in shapes)
        return cls(path, sizes[-1], sizes[0], shapes)


@dataclass(frozen=True)
class HeadSite(CopySite):
    """At a module of the model's head, of which every delta has a copy, whatever its method."""


def head_sites(family: Family) -> list[HeadSite]:
    """The sites of a model's head; none where it is the base's own."""
    return [HeadSite(p.path, p.shapes[0][1][-1], p.shapes[0][1][0], p.shapes) for p in family.trained_head]


def head_factor(site: HeadSite, rates: RateRule) -> float:
    """What a head's rate is of that of a method with these rates, on the same base."""
    width = site.in_features
    return min(1.0, _HEAD_RATES.at(width).rate / rates.at(width).rate)


class TrainedCopy(OutputModule):
    """The host with weights of its own, float32, which begin as the host's. It computes what the host would compute
    with them, in the dtype of its input: merging it writes the very weights that it computed with."""

    def __init__(self, site: CopySite, rate_ratio: float = 1.0) -> None:
        super().__init__()
        self.rate_ratio = rate_ratio  # of the run's learning rate
        for name, shape in site.shapes:
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def on_attach(self, host: nn.Module) -> None:
        own = dict(host.named_parameters(recurse=False))
        if not all(is_plain(parameter) for parameter in own.values()):
            raise ConfigError(
                f"{type(host).__name__} holds quantised weights: a copy of it cannot be trained. Load the base with "
                "this module left as it is."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                if not parameter.is_meta:
                    self.get_parameter(name).copy_(parameter)
        # not a child of this module: it is the base's
        self.__dict__["_host"] = host

    def rate_factor(self, name: str) -> float:
        return self.rate_ratio

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The host's output for `x` with this copy's weights, in the dtype of `x`; `y`, the host's own, is left."""
        host: nn.Module = self.__dict__["_host"]
        # an object for this call alone, so that threads that share the host do not meet; its `forward` is the class's
        # own, which no hook stands around
        stand_in = object.__new__(type(host))
        own = {name: parameter.to(x.dtype) for name, parameter in self._parameters.items() if parameter is not None}
        stand_in.__dict__ = host.__dict__ | {"_parameters": dict.fromkeys(host._parameters) | own}
        output: Tensor = type(host).forward(stand_in, x)
        return output

    def merge_into(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = self.get_parameter(name).detach().to(parameter.dtype)
