"""A copy of one of the base's own modules that is trained in its place: a head, a norm."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectune.compute.row_products import row_products
from spectune.deltas.modules import Kind, Operands, OutputModule
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


#: the host's output for `x` `[rows, tokens, features]`, with each row's own weights
_Form = Callable[[nn.Module, Operands, Tensor], Tensor]


class TrainedCopy(OutputModule):
    """The host with weights of its own, float32, which begin as the host's. It computes what the host would compute
    with them, in the dtype of its input: merging it writes the very weights that it computed with."""

    replaces_output = True

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
        self._form = _form_by_row(host)

    def rate_factor(self, name: str) -> float:
        return self.rate_ratio

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The host's output for `x` with this copy's weights, in the dtype of `x`; `y`, the host's own, is left."""
        own = {name: parameter.to(x.dtype) for name, parameter in self._parameters.items() if parameter is not None}
        return _called_with(self.__dict__["_host"], own, x)

    def operands(self) -> dict[str, Tensor] | None:
        return None if self._form is None else dict(self.named_parameters())

    def unchanging(self) -> dict[str, Tensor] | None:
        host: nn.Module = self.__dict__["_host"]
        own = self.operands()
        return None if own is None else {name: host.get_parameter(name).detach().float() for name in own}

    def alike(self) -> Kind:
        return Kind(TrainedCopy, (self.__dict__["_host"], self._form))

    @staticmethod
    def by_row(operands: Operands, x: Tensor, y: Tensor, host: nn.Module, form: _Form) -> Tensor:
        return form(host, operands, x)

    def merge_into(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = self.get_parameter(name).detach().to(parameter.dtype)


def _called_with(host: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the host computes of `x` with other parameters; those that are not named are None."""
    # an object for this call alone, so that threads that share the host do not meet; its `forward` is the class's own,
    # which no hook stands around
    stand_in = object.__new__(type(host))
    stand_in.__dict__ = host.__dict__ | {"_parameters": dict.fromkeys(host._parameters) | parameters}
    output: Tensor = type(host).forward(stand_in, x)
    return output


def _form_by_row(host: nn.Module) -> _Form | None:
    """How the host computes rows with weights of their own in one go, None where that is not known."""
    if type(host) is nn.Linear:
        return _linear
    if type(host) in (nn.LayerNorm, nn.RMSNorm):
        return _normed
    return _as_it_is if _broadcasts(host) else None


def _linear(host: nn.Module, own: Operands, x: Tensor) -> Tensor:
    made = row_products(own["weight"], x)
    return made + own["bias"][:, None].to(x.dtype) if "bias" in own else made


def _normed(host: nn.Module, own: Operands, x: Tensor) -> Tensor:
    """These kernels take one vector for all rows: norm first, and scale after, rounding once as they do."""
    made = _called_with(host, {}, x.float()) * own["weight"][:, None].to(x.dtype)
    return (made + own["bias"][:, None].to(x.dtype) if "bias" in own else made).to(x.dtype)


def _as_it_is(host: nn.Module, own: Operands, x: Tensor) -> Tensor:
    return _called_with(host, {name: vector[:, None].to(x.dtype) for name, vector in own.items()}, x)


def _broadcasts(host: nn.Module) -> bool:
    """Whether a host computes with a vector for each row what it computes with each vector alone; asked on the CPU,
    whatever device is set where this is called (the meta device in planning)."""
    shapes = {name: parameter.shape for name, parameter in host.named_parameters(recurse=False)}
    if any(len(shape) != 1 for shape in shapes.values()):
        return False
    size = next(iter(shapes.values()))[0]
    with torch.device("cpu"):
        place = torch.linspace(-1, 2, 2 * size).view(2, size)
        own = {name: place.roll(number, 1) + number for number, name in enumerate(shapes)}
        x = place.flip(1)[:, None]
        try:
            together = _as_it_is(host, own, x)
            alone = [_called_with(host, {name: vector[row] for name, vector in own.items()}, x[row]) for row in (0, 1)]
        except Exception:  # of whatever kind: it is asked a thing it was not made for
            return False
    return together.shape == x.shape and torch.allclose(together, torch.stack(alone), rtol=1e-5, atol=1e-6)
