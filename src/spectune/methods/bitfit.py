"""BitFit: train the biases only.

Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
arXiv 2106.10199. What is trained and stored here is an offset for each bias, `y + delta`: the same function and the
same gradient as training the bias itself, but the base stays as it is. A base with no bias at all (Llama) gets
offsets at its linears, the head excepted, with a notice to the user. A bias that is not the last thing added to its
module's output (convolutions, state-space steps, experts, routers) is changed in its own place while its layer runs.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from spectune.deltas import (
    SWEEPS,
    DeltaModule,
    InitContext,
    Method,
    Operands,
    OutputModule,
    OutputSite,
    ParameterModule,
    ParameterSite,
    RatePoint,
    RateRule,
    Site,
)  # fmt: skip
from spectune.errors import ConfigError
from spectune.families import Family


class Offset(OutputModule):
    """`y + offset`: `offset` `[out_features]`, zero at the start."""

    def __init__(self, site: OutputSite) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(site.out_features))

    acts_on = "bias"

    def changed(self, parameter: Tensor) -> Tensor:
        return parameter + self.offset.to(parameter.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.offset.to(y.dtype)

    def operands(self) -> dict[str, Tensor]:
        return {"offset": self.offset}

    @staticmethod
    def by_row(operands: Operands, x: Tensor, y: Tensor) -> Tensor:
        return y + operands["offset"][:, None].to(y.dtype)

    def merge_into(self, module: nn.Module) -> None:
        bias = getattr(module, "bias", None)
        if not isinstance(bias, nn.Parameter):
            raise ConfigError(
                f"{type(module).__name__} has no bias to merge into: this model type's config cannot express one. "
                "Keep the delta attached."
            )
        bias.data = (bias.float() + self.offset.to(bias.device)).to(bias.dtype)


class BiasOffset(ParameterModule):
    """`bias + offset` in the bias's own place: `offset` has the bias's shape, zero at the start."""

    def __init__(self, site: ParameterSite) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(site.shape))

    def changed(self, parameter: Tensor) -> Tensor:
        return parameter + self.offset.to(parameter.dtype)


class BitFit(Method):
    """Train the biases only, as offsets (Ben Zaken et al. 2022)."""

    name: Literal["bitfit"] = "bitfit"

    label: ClassVar[str] = "BitFit"
    best_for: ClassVar[str] = "the smallest files that still reach every layer; small shifts of style or domain"
    learning_rates: ClassVar[RateRule] = RateRule((
        RatePoint(224, 0.02, SWEEPS),
        RatePoint(448, 0.04, SWEEPS),
        RatePoint(640, 0.08, SWEEPS),
        RatePoint(896, 0.12, SWEEPS),
        RatePoint(4096, 1e-3, "the settings of its authors and for GPT-3 (1e-3 and 1.6e-3)", strong=False),
    ))  # fmt: skip
    can_merge: ClassVar[bool] = True

    def sites(self, family: Family) -> list[Site]:
        if family.biases:
            return [
                OutputSite(bias.path, bias.size, bias.size)
                if bias.additive
                else ParameterSite(bias.path, bias.name, bias.shape)
                for bias in family.biases
            ]
        free = [linear for linear in family.linears if linear.bias_equivalent]
        return [OutputSite(linear.path, linear.in_features, linear.out_features) for linear in free]

    def build(self, site: Site) -> Offset | BiasOffset:
        if isinstance(site, ParameterSite):
            return BiasOffset(site)
        assert isinstance(site, OutputSite)
        return Offset(site)

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        """Offsets are zero from the start."""

    def notice(self, family: Family) -> str | None:
        if family.biases:
            return None
        return (
            f"this {family.model_type} model has no biases: BitFit trains a new offset at each of "
            f"{len(self.sites(family))} linears (the head excepted, and those that a convolution follows or that give "
            "scores)" + ("; its experts, which are parameters and no linears, get none" if family.experts else "")
        )
