"""Bottleneck adapters: small residual networks between the parts of each layer.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751:
`A(h) = h + W_up f(W_down h + b_down) + b_up`, with `W_up` zero here, so that training starts at the base.
Placements: after each sublayer as in that paper ("attention+ffn"), after the feed-forward only (Pfeiffer et al. 2021,
arXiv 2005.00247, "ffn"), beside the feed-forward on its input (He et al. 2022, arXiv 2110.04366, "parallel"), or after
the whole block on the residual stream ("block").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from spectune.compute.row_products import row_products
from spectune.deltas import (
    SWEEPS,
    DeltaModule,
    InitContext,
    Kind,
    Method,
    Operands,
    OutputModule,
    OutputSite,
    RatePoint,
    RateRule,
    Site,
)  # fmt: skip
from spectune.errors import ConfigError
from spectune.families import Family

#: He et al. 2022 scale the parallel adapter by 4
PARALLEL_SCALE = 4.0


class Bottleneck(OutputModule):
    """`y + up(f(down(y)))`, or in parallel `y + 4 up(f(down(x)))`."""

    def __init__(self, site: OutputSite, method: BottleneckAdapter) -> None:
        super().__init__()
        self.down = nn.Linear(site.in_features, method.bottleneck_dim)
        self.up = nn.Linear(method.bottleneck_dim, site.out_features)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.activation = _activation(method.activation)
        self.dropout = nn.Dropout(method.dropout) if method.dropout else nn.Identity()  # see LoRALayer
        self.parallel = method.placement == "parallel"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x if self.parallel else y
        low = F.linear(self.dropout(h), self.down.weight.to(h.dtype), self.down.bias.to(h.dtype))
        change = F.linear(self.activation(low), self.up.weight.to(h.dtype), self.up.bias.to(h.dtype))
        return y + PARALLEL_SCALE * change if self.parallel else y + change

    def operands(self) -> dict[str, Tensor] | None:
        if next(self.activation.parameters(), None) is not None:
            return None  # each delta's activation is its own
        return {"down": self.down.weight, "down_bias": self.down.bias, "up": self.up.weight, "up_bias": self.up.bias}

    def alike(self) -> Kind:
        dropout = self.dropout.p if isinstance(self.dropout, nn.Dropout) else 0.0
        return Kind(Bottleneck, (self.activation, self.parallel), dropout)

    @staticmethod
    def by_row(operands: Operands, x: Tensor, y: Tensor, activation: nn.Module, parallel: bool) -> Tensor:
        h = x if parallel else y
        low = row_products(operands["down"], h) + operands["down_bias"][:, None].to(h.dtype)
        change = row_products(operands["up"], activation(low)) + operands["up_bias"][:, None].to(h.dtype)
        return y + PARALLEL_SCALE * change if parallel else y + change


def _activation(name: str) -> nn.Module:
    """One for all modules, so that they are alike; with weights, one for each."""
    made = _stateless(name)
    return made if next(made.parameters(), None) is None else ACT2FN[name]


@functools.cache
def _stateless(name: str) -> nn.Module:
    found: nn.Module = ACT2FN[name]
    return found


class BottleneckAdapter(Method):
    """Bottleneck adapters in every layer (Houlsby et al. 2019 and later placements).

    Attributes:
        bottleneck_dim: width of the bottleneck.
        placement: "block" after each block, "ffn" after each feed-forward, "attention+ffn" after both sublayers,
            "parallel" beside the feed-forward.
        activation: a transformers activation name.
        dropout: on the adapter's input, in training.
    """

    name: Literal["adapter"] = "adapter"
    bottleneck_dim: int = Field(64, ge=1)
    placement: Literal["block", "ffn", "attention+ffn", "parallel"] = "block"
    activation: str = "gelu"
    dropout: float = Field(0.1, ge=0, lt=1)

    label: ClassVar[str] = "Adapter"
    best_for: ClassVar[str] = "many tasks on one base, where a little latency is affordable"
    learning_rates: ClassVar[RateRule] = RateRule((
        RatePoint(224, 9e-3, SWEEPS),
        RatePoint(448, 6e-3, SWEEPS),
        RatePoint(896, 6e-3, SWEEPS),
        RatePoint(4096, 3e-4, "LLM-Adapters' setting for LLaMA-7B", strong=False),
    ))  # fmt: skip

    def model_post_init(self, _: object) -> None:
        if self.activation not in ACT2FN:
            raise ConfigError(f"adapter.activation = {self.activation!r}: expected one of {', '.join(sorted(ACT2FN))}")

    def sites(self, family: Family) -> list[Site]:
        found: list[Site] = []
        for layer in family.layers:
            hidden = layer.hidden_size
            if self.placement == "block":
                found.append(OutputSite(layer.path, hidden, hidden))
            if self.placement == "attention+ffn":
                if layer.attention is None:
                    raise ConfigError(f"{layer.path} has no attention; use placement 'block' or 'ffn'")
                found.append(OutputSite(layer.attention.path, hidden, hidden))
            if self.placement in ("ffn", "attention+ffn", "parallel"):
                ffn = layer.feed_forward
                if ffn is None or (self.placement == "parallel" and not ffn.whole):
                    raise ConfigError(
                        f"{layer.path}: its feed-forward is not a module of its own whose input could be seen; "
                        f"placement {self.placement!r} is refused, use 'block'"
                    )
                found.append(OutputSite(ffn.path, hidden, hidden))
        return found

    def build(self, site: Site) -> Bottleneck:
        assert isinstance(site, OutputSite)
        return Bottleneck(site, self)

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        for _, module in modules:
            assert isinstance(module, Bottleneck)
            bound = 1 / math.sqrt(module.down.in_features)
            weight = torch.empty(module.down.weight.shape).uniform_(-bound, bound, generator=context.generator)
            module.down.weight.copy_(weight)
