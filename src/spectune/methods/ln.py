"""LN tuning: train the normalisations' own weights, and nothing else.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", arXiv 2312.11420 (their
"LayerNorm-simp."); the final norm is among them, as in PEFT. Each norm has a float32 copy that computes in its place:
the base stays as it is, and rows of one batch may have norms of their own. A norm that takes a gate beside its input is
not copied: its weights are exchanged while their layer runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from spectune.deltas import (
    SWEEPS,
    CopySite,
    DeltaModule,
    Fitted,
    InitContext,
    Method,
    ParameterModule,
    ParameterSite,
    RatePoint,
    RateRule,
    Search,
    Site,
    TrainedCopy,
    check_keys,
    checked_targets,
    ends_with,
)  # fmt: skip
from spectune.deltas.peft_config import PREFIX
from spectune.errors import ConfigError, DataError
from spectune.families import Family, Norm

ALL_NORMS = "all-norms"
_COPY = ".ln_tuning_layers."


class VectorCopy(ParameterModule):
    """One of a norm's vectors in the base's own one's place."""

    def __init__(self, site: ParameterSite) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(site.shape))

    def changed(self, parameter: Tensor) -> Tensor:
        return self.vector.to(parameter.dtype)


class LNTuning(Method):
    """Train the weights of normalisations (Zhao et al. 2023).

    Attributes:
        target_modules: `"all-norms"` (every norm of the decoder), a list of module-name endings
            (`["input_layernorm"]`), or one regular expression that must match a whole module path.
    """

    name: Literal["ln"] = "ln"
    target_modules: str | tuple[str, ...] = ALL_NORMS

    label: ClassVar[str] = "LN tuning"
    best_for: ClassVar[str] = "the smallest files on bases without biases; small shifts of style or domain"
    learning_rates: ClassVar[RateRule] = RateRule((
        RatePoint(224, 0.035, SWEEPS),
        RatePoint(448, 0.055, SWEEPS),
        RatePoint(4096, 1e-3, "BitFit's settings, whose weights are vectors too", strong=False),
    ))  # fmt: skip
    can_merge: ClassVar[bool] = True

    def sites(self, family: Family) -> list[Site]:
        found: list[Site] = []
        for norm in self._targeted(family):
            if norm.alone:
                shapes = tuple((name, (norm.size,)) for name in norm.parameters)
                found.append(CopySite(norm.path, norm.size, norm.size, shapes))
            else:
                found += [ParameterSite(norm.path, name, (norm.size,)) for name in norm.parameters]
        return found

    def build(self, site: Site) -> TrainedCopy | VectorCopy:
        if isinstance(site, ParameterSite):
            return VectorCopy(site)
        assert isinstance(site, CopySite)
        return TrainedCopy(site)

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        for site, module in modules:
            if isinstance(module, VectorCopy):  # the other copies have begun as the base's
                module.vector.copy_(context.model.get_parameter(site.path))

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return checked_targets(value)

    def _targeted(self, family: Family) -> list[Norm]:
        """The norms that `target_modules` names. Raises ConfigError: a name that matches none."""
        wanted, search = self.target_modules, Search()
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        if wanted == ALL_NORMS:
            at = {wanted: list(family.norms)}
        elif isinstance(wanted, str):
            at = {wanted: [norm for norm in family.norms if search.whole(wanted, norm.path)]}
        else:
            at = {name: [norm for norm in family.norms if ends_with(norm.path, name)] for name in names}
        if missing := [name for name in names if not at[name]]:
            known = sorted({norm.path.rpartition(".")[2] for norm in family.norms})
            raise ConfigError(
                f"target_modules: {', '.join(map(repr, missing))} matches no trainable norm of this "
                f"{family.model_type} model; " + (f"its norms end in: {', '.join(known)}" if known else "it has none")
            )
        found = {norm.path for norms in at.values() for norm in norms}
        return [norm for norm in family.norms if norm.path in found]

    # PEFT's layout: base_model.model.<module>.ln_tuning_layers.weight, and .bias

    def to_folder(self, state: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = {
            "peft_type": "LN_TUNING",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "target_modules": [norm.path for norm in self._targeted(family)],
        }
        tensors = {}
        for key, tensor in state.items():
            path, _, name = key.removesuffix(".vector").rpartition(".")
            tensors[f"{PREFIX}{path}{_COPY}{name}"] = tensor
        return config, tensors

    def from_folder(self, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        gated = {norm.path for norm in family.norms if not norm.alone}
        found = {}
        for key, tensor in tensors.items():
            if _COPY not in key:
                found[key] = tensor
                continue
            path, _, name = key.removeprefix(PREFIX).rpartition(_COPY)
            found[f"{path}.{name}.vector" if path in gated else f"{path}.{name}"] = tensor
        return found

    def fitted_to(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: Family) -> Fitted:
        at = {name.removeprefix(PREFIX).partition(_COPY)[0] for name in tensors if _COPY in name}
        if not at:
            raise DataError("it holds no tensor of LN_TUNING: nothing is adapted")
        if others := sorted(at - {norm.path for norm in family.norms}):
            raise DataError(f"it has weights for what is no norm of this {family.model_type} model's decoder", others)
        named = self._targeted(family)
        paths = tuple(norm.path for norm in named if norm.path in at)
        if not paths:
            raise DataError(f"it holds no tensor <module>{_COPY}... for a norm that its config names: nothing is tuned")
        # what PEFT's config names beside them has no weights, and acts as the base
        same = len(paths) == len(named)
        return Fitted(self if same else self.model_copy(update={"target_modules": paths}))

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any]) -> LNTuning | None:
        if config.get("peft_type") != "LN_TUNING":
            return None
        check_keys(config, "LN tuning", ())
        modules = config["target_modules"]
        return cls(target_modules=modules if isinstance(modules, str) else tuple(sorted(modules)))
