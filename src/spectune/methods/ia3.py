"""IA3: scale keys, values and the feed-forward's inner features by learned vectors.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv
2205.05638, section 3.3: `softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V)` and `(l_ff * f(W1 x)) W2`, all vectors one at the
start. Keys are scaled where their projection gives them, before rotary positions, so that attention stays a function
of distances. The feed-forward is scaled right after its nonlinearity; with a gated one that is the same as scaling the
product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.deltas import (
    SWEEPS,
    DeltaModule,
    EntryModule,
    Fitted,
    InitContext,
    Kind,
    Method,
    Operands,
    OutputModule,
    OutputSite,
    RatePoint,
    RateRule,
    Site,
    cached_values,
    check_ia3_keys,
    ends_with,
    exact_names,
    left_out,
    placed,
    targets,
)  # fmt: skip
from spectune.deltas.peft_config import PREFIX
from spectune.errors import ConfigError, DataError
from spectune.families import Family, Linear

_VECTOR = ".ia3_l"


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
        return y * self.whole().to(y.dtype)

    def whole(self) -> Tensor:
        """One vector for all outputs, `[out_features]`, float32."""
        pieces, end = [], 0
        for name, start, size in self.site.parts:
            vector = self.get_parameter(name)
            pieces += [vector.new_ones(start - end), vector]
            end = start + size
        pieces.append(pieces[-1].new_ones(self.site.out_features - end))
        return torch.cat(pieces)

    def operands(self) -> dict[str, Tensor]:
        return {"scale": self.whole()}

    def unchanging(self) -> dict[str, Tensor]:
        return _ones(self.operands())

    def alike(self) -> Kind:
        return Kind(ScaledOutput)


class Scale(nn.Module):
    """One vector for all features of one side of a linear, ones at the start."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))

    def operands(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def unchanging(self) -> dict[str, Tensor]:
        return _ones(self.operands())


class ScaledOutput(Scale, OutputModule):
    """`y * l`, `[out_features]`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.scale.to(y.dtype)

    @staticmethod
    def by_row(operands: Operands, x: Tensor, y: Tensor) -> Tensor:
        return y * operands["scale"][:, None].to(y.dtype)


class ScaledInput(Scale, EntryModule):
    """`x * l`, `[in_features]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)

    @staticmethod
    def by_row(operands: Operands, x: Tensor) -> Tensor:
        return x * operands["scale"][:, None].to(x.dtype)


def _ones(operands: Operands) -> dict[str, Tensor]:
    return {name: torch.ones_like(tensor) for name, tensor in operands.items()}


class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022).

    Attributes:
        target_modules: linears that are scaled in place of the paper's keys, values and feed-forwards, by the ends of
            their paths (`["q_proj", "v_proj", "down_proj"]`), as PEFT has it; None is the paper's.
        feedforward_modules: those of them whose input is scaled and not their output.
    """

    name: Literal["ia3"] = "ia3"
    target_modules: tuple[str, ...] | None = None
    feedforward_modules: tuple[str, ...] = ()

    label: ClassVar[str] = "IA3"
    best_for: ClassVar[str] = "very few examples, and files of some kilobytes"
    learning_rates: ClassVar[RateRule] = RateRule((
        RatePoint(224, 0.17, SWEEPS),
        RatePoint(448, 0.2, SWEEPS),
        RatePoint(640, 0.46, SWEEPS),
        RatePoint(896, 0.43, SWEEPS),
        RatePoint(4096, 3e-3, "T-Few's setting for 3B and 11B", strong=False),
    ))  # fmt: skip

    @model_validator(mode="after")
    def _some_of_the_targets(self) -> IA3:
        if self.target_modules is not None and not all(self.target_modules or ("",)):
            raise ValueError("target_modules is empty: nothing would be trained")
        if not set(self.feedforward_modules) <= set(self.target_modules or ()):
            raise ValueError("feedforward_modules must be some of target_modules")
        return self

    def sites(self, family: Family) -> list[Site]:
        if self.target_modules is not None:
            return [
                OutputSite(t.path, t.in_features, t.out_features, entry=self._scales_input(t))
                for t in targets(family, self.target_modules)
            ]
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

    def build(self, site: Site) -> DeltaModule:
        if isinstance(site, ScaledSite):
            return Rescale(site)
        assert isinstance(site, OutputSite)
        return ScaledInput(site.in_features) if site.entry else ScaledOutput(site.out_features)

    def _scales_input(self, linear: Linear) -> bool:
        return any(ends_with(linear.path, name) for name in self.feedforward_modules)

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        """Vectors are ones from the start."""

    def prove(self, model: PreTrainedModel, family: Family) -> None:
        """Values lie in the cache as their projection gives them: a fused projection in another order shows there."""
        if self.target_modules is not None:
            return
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
        if self.target_modules is not None:
            return left_out(family, self.target_modules)
        without = sum(layer.feed_forward is None or layer.feed_forward.activation is None for layer in family.layers)
        if not without:
            return None
        return (
            f"{without} of {len(family.layers)} feed-forwards of this {family.model_type} model have no nonlinearity "
            "of their own (experts): IA3 scales keys and values only there"
        )

    # PEFT's layout: base_model.model.<module>.ia3_l, [out, 1], or [1, in] where its input is scaled

    def to_folder(self, state: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        parts = _parts(self, family)
        names = None if parts is None else _peft_names(parts, family)
        if parts is None or names is None:  # something stands between a nonlinearity and the linear that PEFT scales
            return super().to_folder(state, family)
        tensors = {}
        for (path, inner), (width, vectors) in parts.items():
            whole = next(iter(state.values())).new_ones(width)
            for name, start, size in vectors:
                whole[start : start + size] = state[name]
            tensors[f"{PREFIX}{path}{_VECTOR}"] = whole[None, :] if inner else whole[:, None]
        config: dict[str, Any] = {
            "peft_type": "IA3",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            **names,
            "fan_in_fan_out": family.conv1d,
        }
        return config, tensors

    def from_folder(self, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        state = {name: tensor for name, tensor in tensors.items() if not name.endswith(_VECTOR)}
        parts = {
            path: (inner, width, vectors) for (path, inner), (width, vectors) in (_parts(self, family) or {}).items()
        }
        for name, tensor in tensors.items():
            path = name.removeprefix(PREFIX).removesuffix(_VECTOR)
            if name in state:
                continue
            if path not in parts:
                state[name] = tensor  # surplus: said with all others
                continue
            inner, width, vectors = parts[path]
            if list(tensor.shape) != (shape := [1, width] if inner else [width, 1]):
                raise DataError(f"{name} is {list(tensor.shape)}, expected {shape}")
            whole = tensor.flatten()
            rest = torch.ones_like(whole, dtype=torch.bool)
            for vector, start, size in vectors:
                state[vector] = whole[start : start + size]
                rest[start : start + size] = False
            if tensor.is_meta or bool((whole[rest] == 1).all()):
                continue
            if bool(whole[rest].isfinite().all()):
                raise DataError(f"{name} scales more than keys and values, which this method does not")
            state[name] = whole  # that it is not finite is said with all others
        return state

    def fitted_to(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: Family) -> Fitted:
        at = placed(config, tensors, _VECTOR[1:], family)
        shapes = {path: list(tensors[f"{PREFIX}{path}{_VECTOR}"].shape) for path in at.paths}
        inner = {path for path, shape in shapes.items() if shape[:1] == [1]}
        parts: _Parts = {(path, path in inner): (0, ()) for path in at.paths}
        names = _peft_names(parts, family)
        if names is None or any(isinstance(found, str) for found in names.values()):
            names = {"target_modules": list(at.paths), "feedforward_modules": [p for p in at.paths if p in inner]}
        return Fitted(self.model_copy(update={key: tuple(found) for key, found in names.items()}), at.left_out, at.said)

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any]) -> IA3 | None:
        if config.get("peft_type") != "IA3":
            return None
        check_ia3_keys(config)
        return cls()  # which linears it scales, and on which side, its tensors say


#: by linear, and whether its input is scaled: features there, and the vectors (name, where it begins, length)
_Parts = dict[tuple[str, bool], tuple[int, tuple[tuple[str, int, int], ...]]]


def _parts(method: IA3, family: Family) -> _Parts | None:
    """Every vector of a delta's as PEFT places it. None where PEFT has no place for one of them."""
    readers = {ffn.activation: ffn.reader for layer in family.layers if (ffn := layer.feed_forward) and ffn.activation}
    found: _Parts = {}
    for site in method.sites(family):
        assert isinstance(site, OutputSite)
        if not isinstance(site, ScaledSite):
            width = site.in_features if site.entry else site.out_features
            found[site.path, site.entry] = width, ((f"{site.path}.scale", 0, width),)
            continue
        path: str | None = readers.get(site.path, site.path)
        if path is None:
            return None
        found[path, site.path in readers] = (
            site.out_features, tuple((f"{site.path}.{name}", start, size) for name, start, size in site.parts)
        )  # fmt: skip
    return found


def _peft_names(parts: _Parts, family: Family) -> dict[str, Any] | None:
    """`target_modules` and `feedforward_modules` with which PEFT scales these linears, on these sides, and nothing
    else; None where it cannot: it takes a feed-forward's name for the end of any other, dot or not."""
    every = [*(linear.path for linear in family.linears), *(other.path for other in family.others)]
    sides = {inner: [path for path, side in parts if side is inner] for inner in (False, True)}
    names = {
        inner: exact_names(paths, [path for path in every if path not in set(paths)]) for inner, paths in sides.items()
    }
    outside, inside = names[False], names[True]
    if isinstance(outside, str) or isinstance(inside, str):
        return None
    if any(path.endswith(inside) for path in sides[False]):
        inside = tuple(sides[True])
    if any(path.endswith(inside) for path in sides[False]):
        return None
    return {"target_modules": sorted({*outside, *inside}), "feedforward_modules": list(inside)}
