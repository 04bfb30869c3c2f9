"""IA3: scale keys, values and the feed-forward's inner features by learned vectors.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv
2205.05638, section 3.3: `softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V)` and `(l_ff * f(W1 x)) W2`, all vectors one at the
start. Keys are scaled where their projection gives them, before rotary positions, so that attention stays a function
of distances. The feed-forward is scaled right after its nonlinearity; with a gated one that is the same as scaling the
product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.deltas import (
    SWEEPS,
    DeltaModule,
    InitContext,
    Method,
    OutputModule,
    OutputSite,
    RatePoint,
    RateRule,
    Site,
    cached_values,
)  # fmt: skip
from spectune.errors import ConfigError
from spectune.families import Family


@dataclass(frozen=True)
class ScaledSite(OutputSite):
    """A site with its vectors: name, where it begins among the site's outputs, length; in that order."""

    parts: tuple[tuple[str, int, int], ...]


class Rescale(OutputModule):
    """`y * l` on some of the site's outputs: one vector for each part, ones at the start."""

    def __init__(self, site: ScaledSite) -> None:
        super().__init__()
        self.site = site
        for name, _, size in site.parts:
            self.register_parameter(name, nn.Parameter(torch.ones(size)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pieces, end = [], 0
        for name, start, size in self.site.parts:
            vector = self.get_parameter(name)
            pieces += [vector.new_ones(start - end), vector]
            end = start + size
        pieces.append(pieces[-1].new_ones(self.site.out_features - end))
        return y * torch.cat(pieces).to(y.dtype)


class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022)."""

    name: Literal["ia3"] = "ia3"

    label: ClassVar[str] = "IA3"
    best_for: ClassVar[str] = "very few examples, and files of some kilobytes"
    learning_rates: ClassVar[RateRule] = RateRule((
        RatePoint(224, 0.17, SWEEPS),
        RatePoint(448, 0.2, SWEEPS),
        RatePoint(640, 0.46, SWEEPS),
        RatePoint(896, 0.43, SWEEPS),
        RatePoint(4096, 3e-3, "T-Few's setting for 3B and 11B", strong=False),
    ))  # fmt: skip

    def sites(self, family: Family) -> list[Site]:
        found: list[Site] = []
        for layer in family.layers:
            attention, ffn = layer.attention, layer.feed_forward
            if attention is None or attention.keys is None or attention.values is None:
                where = layer.path if attention is None else attention.path
                raise ConfigError(
                    f"IA3 is refused: which outputs at {where} are keys and values cannot be told. Use LoRA."
                )
            slices = {"key": attention.keys, "value": attention.values}
            for path in dict.fromkeys(s.path for s in slices.values()):
                here = {name: s for name, s in slices.items() if s.path == path}
                width = next(iter(here.values())).out_features
                parts = tuple((name, s.start, s.size) for name, s in here.items())
                found.append(ScaledSite(path, width, width, parts))
            if ffn is not None and ffn.activation is not None:
                inner = ffn.inner_size
                found.append(ScaledSite(ffn.activation, inner, inner, (("hidden", 0, inner),)))
        return found

    def build(self, site: Site) -> Rescale:
        assert isinstance(site, ScaledSite)
        return Rescale(site)

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        """Vectors are ones from the start."""

    def prove(self, model: PreTrainedModel, family: Family) -> None:
        """Values lie in the cache as their projection gives them: a fused projection in another order shows there."""
        wanted = [a.values for a in family.attentions if a.values is not None]
        seen, cached = cached_values(model, [values.path for values in wanted])
        for index, values in enumerate(wanted):
            given = seen[values.path][:, values.start : values.start + values.size]
            if index >= len(cached) or cached[index].shape != given.shape or not torch.equal(cached[index], given):
                raise ConfigError(
                    f"IA3 is refused: the values of layer {index} are not the outputs {values.start} to "
                    f"{values.start + values.size} of {values.path} (a projection fused head by head, or norms on "
                    "values). Use LoRA or adapters."
                )

    def notice(self, family: Family) -> str | None:
        without = sum(layer.feed_forward is None or layer.feed_forward.activation is None for layer in family.layers)
        if not without:
            return None
        return (
            f"{without} of {len(family.layers)} feed-forwards of this {family.model_type} model have no nonlinearity "
            "of their own (experts): IA3 scales keys and values only there"
        )
