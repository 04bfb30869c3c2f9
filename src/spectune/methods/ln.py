"""LN tuning: train the normalisations' own weights, and nothing else.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", arXiv 2312.11420 (their
"LayerNorm-simp."); the final norm is among them, as in PEFT. Each norm has a float32 copy that computes in its place:
the base stays as it is, and rows of one batch may have norms of their own. A norm that takes a gate beside its input is
not copied: its weights are exchanged while their layer runs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn
from torch.func import functional_call

from spectune.deltas import (
    SWEEPS,
    DeltaModule,
    Fitted,
    InitContext,
    Method,
    OutputModule,
    OutputSite,
    ParameterModule,
    ParameterSite,
    RatePoint,
    RateRule,
    Search,
    Site,
    checked_targets,
    ends_with,
)  # fmt: skip
from spectune.deltas.peft_config import PREFIX, check_keys
from spectune.errors import ConfigError, DataError
from spectune.families import Family, Norm

ALL_NORMS = "all-norms"
_COPY = ".ln_tuning_layers."


@dataclass(frozen=True)
class NormSite(OutputSite):
    """A norm, with the names of its parameters."""

    parameters: tuple[str, ...]


class NormCopy(OutputModule):
    """The norm with weights of its own, in place of the base's: `y` is not used."""

    def __init__(self, site: NormSite) -> None:
        super().__init__()
        self.names = site.parameters
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.zeros(site.out_features)))

    def on_attach(self, host: nn.Module) -> None:
        shell = copy.copy(host)  # what it computes with and no weights, children or hooks, nor another `forward`
        settings = {name: value for name, value in vars(host).items() if name != "forward"}
        torchs = (name for name, value in settings.items() if name.startswith("_") and isinstance(value, dict))
        shell.__dict__ = {**settings, **{name: {} for name in torchs}}
        self._host, self._shell = (
            [host],
            [shell],
        )  # in lists: neither is this module's child

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        host, shell = self._host[0], self._shell[0]
        own = {name: self.get_parameter(name).to(host.get_parameter(name).dtype) for name in self.names}
        if torch.compiler.is_compiling():
            compiled: Tensor = functional_call(shell, own, (x,))
            return compiled
        here = copy.copy(shell)  # of this call alone: threads share the other one
        here.__dict__["_parameters"] = own
        made: Tensor = here.forward(x)
        return made

    def merge_into(self, module: nn.Module) -> None:
        for name in self.names:
            weight = module.get_parameter(name)
            weight.data = self.get_parameter(name).detach().to(weight.dtype)


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
        RatePoint(448, 0.06, SWEEPS),
        RatePoint(4096, 1e-3, "BitFit's settings, whose weights are vectors too", strong=False),
    ))  # fmt: skip
    can_merge: ClassVar[bool] = True

    def sites(self, family: Family) -> list[Site]:
        found: list[Site] = []
        for norm in self._targeted(family):
            if norm.alone:
                found.append(NormSite(norm.path, norm.size, norm.size, norm.parameters))
            else:
                found += [ParameterSite(norm.path, name, (norm.size,)) for name in norm.parameters]
        return found

    def build(self, site: Site) -> NormCopy | VectorCopy:
        if isinstance(site, ParameterSite):
            return VectorCopy(site)
        assert isinstance(site, NormSite)
        return NormCopy(site)

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        for site, module in modules:
            if isinstance(site, ParameterSite):
                assert isinstance(module, VectorCopy)
                module.vector.copy_(context.model.get_parameter(site.path))
            else:
                host = context.model.get_submodule(site.path)
                for name, parameter in module.named_parameters():
                    parameter.copy_(host.get_parameter(name))

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
        at = {name.removeprefix(PREFIX).partition(_COPY)[0] for name in tensors}
        paths = tuple(norm.path for norm in family.norms if norm.path in at)
        if others := sorted(at - set(paths)):
            raise DataError(f"it has weights for what is no norm of this {family.model_type} model's decoder", others)
        try:
            same = tuple(norm.path for norm in self._targeted(family)) == paths
        except ConfigError:
            same = False
        return Fitted(self if same else self.model_copy(update={"target_modules": paths}))

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any]) -> LNTuning | None:
        if config.get("peft_type") != "LN_TUNING":
            return None
        check_keys(config, "LN tuning", ())
        modules = config["target_modules"]
        return cls(target_modules=modules if isinstance(modules, str) else tuple(sorted(modules)))
