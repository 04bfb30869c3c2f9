"""LoRA: a low-rank change of linear maps.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3:
`h = W0 x + (alpha / r) B A x`, with `A` `[r, in]` random and `B` `[out, r]` zero, so that training starts at the base.
rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) scales by `alpha / sqrt(r)` instead. With a start at factors `A0`, `B0` of
the base's own weight (PiSSA, OLoRA) the change is `B A - B0 A0`, so that training starts at the base here too. LoRA+
(Hayou et al. 2024, arXiv 2402.12354) trains `B` at a higher rate than `A`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor

from spectune.deltas import (
    ALL_LINEAR,
    SWEEPS,
    TINKER,
    DeltaModule,
    Fitted,
    InitContext,
    MatrixSite,
    Method,
    OutputSite,
    RatePoint,
    RateRule,
    Search,
    Site,
    check_lora_keys,
    check_patterns,
    checked_pattern,
    checked_targets,
    linears_alone,
    parameters_known,
    parameters_named,
    peft_keys,
    peft_targets,
    placed,
    same_targets,
    targets,
    told_apart,
)  # fmt: skip
from spectune.deltas.peft_config import PREFIX
from spectune.errors import ConfigError, DataError, some
from spectune.families import Family, Linear, Matrix
from spectune.methods.low_rank_modules import STARTS, LoRALayer, LoRAMatrix, StartedLoRALayer

#: VeLoRA's, which only its backward pass looks at
_OF_TRAINING = ".lora_velora_embed"
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class _WeightSite(OutputSite):
    """A linear that `target_parameters` names by its weight: ranks go by that name too, as in PEFT."""


class LoRA(Method):
    """Low-rank adaptation of linear maps (Hu et al. 2021).

    Attributes:
        r: rank.
        lora_alpha: the update is scaled by `lora_alpha / r`.
        lora_dropout: dropout on the input of `A`, in training.
        target_modules: `"all-linear"` (every linear of every layer; the head is left alone), a list of module-name
            endings (`["q_proj", "v_proj"]`), or one regular expression that must match a whole module path.
        use_rslora: scale by `lora_alpha / sqrt(r)`.
        init_lora_weights: PEFT's names of starts: True (Kaiming uniform `A`), "gaussian"; "pissa" and "olora" start at
            factors of the base's weight, which stays as it is: so does what the model computes.
        loraplus_lr_ratio: LoRA+: `B`'s learning rate is the run's times this.
        rank_pattern, alpha_pattern: another rank or alpha for some linears, by the end of their path or a regular
            expression for it (`{"q_proj": 4}`); the first that matches counts, as in PEFT.
        target_parameters: matrices that are parameters and no linears, by the end of their name
            (`["experts.gate_up_proj", "experts.down_proj"]`, as in PEFT), or `"all-experts"`. Each expert gets a change
            of rank `r` of its own. Not with `lora_dropout`: there is no input of `A` to drop.
    """

    name: Literal["lora"] = "lora"
    r: int = Field(16, ge=1)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    init_lora_weights: Literal[True, "gaussian", "pissa", "olora"] = True
    loraplus_lr_ratio: float | None = Field(None, gt=0)
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    alpha_pattern: dict[str, PositiveFloat] = Field(default_factory=dict)
    target_parameters: Literal["all-experts"] | tuple[str, ...] = ()

    label: ClassVar[str] = "LoRA"
    best_for: ClassVar[str] = "the default: near full quality, merges away at inference"
    learning_rates: ClassVar[RateRule] = RateRule((
        RatePoint(224, 4e-3, SWEEPS),
        RatePoint(448, 7e-3, SWEEPS),
        RatePoint(640, 4.2e-3, SWEEPS),
        RatePoint(896, 4e-3, SWEEPS),
        RatePoint(2048, 1e-3, TINKER),
        RatePoint(4096, 3e-4, TINKER),
    ))  # fmt: skip
    can_merge: ClassVar[bool] = True
    #: PEFT reads such a linear by its weight, too
    named_by_weight: ClassVar[bool] = True

    @field_validator("target_modules")
    @classmethod
    def _target(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return checked_targets(value) if value else value

    @model_validator(mode="after")
    def _some_target(self) -> Self:
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules is empty: nothing would be trained")
        if self.target_parameters and self.lora_dropout:
            raise ValueError(
                "lora_dropout cannot act on target_parameters, whose inputs the base keeps to itself (PEFT refuses "
                "both together): set lora_dropout to 0"
            )
        if self.target_parameters and self.init_lora_weights in STARTS:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} starts at factors of linears' weights, and "
                "target_parameters are none: use another start"
            )
        return self

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, Number]) -> dict[str, Number]:
        return {checked_pattern(key): item for key, item in value.items()}

    def rank(self, path: str) -> int:
        """The rank at the linear at `path`."""
        return Search().first(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        """The factor of `B A` at the linear at `path`."""
        rank = self.rank(path)
        alpha = Search().first(self.alpha_pattern, path, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def sites(self, family: Family) -> list[Site]:
        linears, by_weight, matrices = self._targets(family)
        paths = [*(t.path for t in linears), *(f"{t.path}.weight" for t in by_weight), *(m.where for m in matrices)]
        for field in ("rank_pattern", "alpha_pattern"):
            check_patterns(field, getattr(self, field), paths)
        return [
            *(OutputSite(t.path, t.in_features, t.out_features) for t in linears),
            *(_WeightSite(t.path, t.in_features, t.out_features) for t in by_weight),
            *(MatrixSite(m.path, m.name, m.shape, m.transposed) for m in matrices),
        ]

    def _targets(self, family: Family) -> tuple[list[Linear], list[Linear], list[Matrix]]:
        """Linears, linears that are named by their weight, and other matrices."""
        linears = targets(family, self.target_modules) if self.target_modules else []
        by_weight, matrices = parameters_named(family, self.target_parameters) if self.target_parameters else ([], [])
        if twice := [linear.path for linear in by_weight if linear in linears]:
            raise ConfigError(
                f"target_parameters names weights of linears that target_modules names too ({some(twice)}): leave them "
                "out of one of both"
            )
        return linears, by_weight, matrices

    def notice(self, family: Family) -> str | None:
        return linears_alone(family, self.target_modules, self._targets(family)[2])

    def build(self, site: Site) -> DeltaModule:
        ratio = self.loraplus_lr_ratio or 1.0
        if isinstance(site, MatrixSite):
            return LoRAMatrix(site, self.rank(site.path), self.scale(site.path), ratio)
        assert isinstance(site, OutputSite)
        named = f"{site.path}.weight" if isinstance(site, _WeightSite) else site.path
        given = site, self.rank(named), self.scale(named), self.lora_dropout
        start = str(self.init_lora_weights)
        layer = StartedLoRALayer(*given, start) if start in STARTS else LoRALayer(*given)
        layer.rate_ratio = ratio
        return layer

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        for _, module in modules:
            assert isinstance(module, LoRALayer | LoRAMatrix)
            module.initialise(context.generator)
            if self.init_lora_weights == "gaussian":
                module.lora_A.normal_(0.0, 1 / module.r, generator=context.generator)

    # PEFT's layout: base_model.model.<module>.lora_A.weight [r, in], .lora_B.weight [out, r]

    def to_folder(self, state: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if family.conv1d and self.init_lora_weights == "olora":
            return super().to_folder(state, family)  # PEFT factors a Conv1D's weight as it lies, transposed
        linears, by_weight, matrices = self._targets(family)
        plain, mistaken = told_apart(family, linears) if self.named_by_weight else (linears, [])
        # by whole names: an end could name something beside the text's layers too
        parameters = sorted([*(f"{t.path}.weight" for t in (*mistaken, *by_weight)), *(m.where for m in matrices)])
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.r,
            # readers annotate it as a whole number
            "lora_alpha": int(self.lora_alpha) if self.lora_alpha == int(self.lora_alpha) else self.lora_alpha,
            "lora_dropout": 0.0 if parameters else self.lora_dropout,  # PEFT reads no dropout beside parameters
            "target_modules": peft_targets([t.path for t in plain], family),
            "use_rslora": self.use_rslora,
            "fan_in_fan_out": family.conv1d,
            "bias": "none",
        }
        named = [*(t.path for t in plain), *parameters]
        patterns = {
            "rank_pattern": _patterns_for(named, self.rank_pattern, self.r, mistaken),
            "alpha_pattern": _patterns_for(named, self.alpha_pattern, self.lora_alpha, mistaken),
            "target_parameters": parameters,
        }
        # only where they are used: older readers need not know them
        config |= {key: found for key, found in patterns.items() if found}
        config |= {"init_lora_weights": self.init_lora_weights} if self.init_lora_weights is not True else {}
        keys = self._matrix_keys(family)
        return config, {f"{PREFIX}{keys.get(name, name)}.weight": tensor for name, tensor in state.items()}

    def from_folder(self, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        if family.conv1d and self.init_lora_weights == "olora" and any(n.startswith(PREFIX) for n in tensors):
            raise DataError("this is PEFT's OLoRA on a Conv1D base, which it starts at the factors of another matrix")
        ours = {theirs: name for name, theirs in self._matrix_keys(family).items()}
        plain = {n.removeprefix(PREFIX).removesuffix(".weight"): tensor for n, tensor in tensors.items()}
        return {ours.get(name, name): tensor for name, tensor in plain.items()}

    def _matrix_keys(self, family: Family) -> dict[str, str]:
        """PEFT's names of the weights at matrices, by ours."""
        sites = [site for site in self.sites(family) if isinstance(site, MatrixSite)] if self.target_parameters else []
        wrappers = peft_keys(sites)
        return {f"{path}.{leaf}": f"{at}.{leaf}" for path, at in wrappers.items() for leaf in ("lora_A", "lora_B")}

    def fitted_to(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: Family) -> Fitted:
        at = placed(config, tensors, "lora_", family)
        search, names = Search(), parameters_known(family, self.target_parameters)
        by_weight, matrices = parameters_named(family, names) if names else ([], [])
        paths = [*at.paths, *(f"{t.path}.weight" for t in by_weight), *(m.where for m in matrices)]
        fields: dict[str, Any] = {
            "target_modules": same_targets(self.target_modules, at.paths, family) if at.paths else (),
            "target_parameters": names,
        }
        for field in ("rank_pattern", "alpha_pattern"):
            matched = {key: [path for path in paths if search.end(key, path)] for key in getattr(self, field)}
            fields[field] = {key: value for key, value in getattr(self, field).items() if matched[key]}
        left_out = at.left_out | {name for name in tensors if name.endswith(_OF_TRAINING)}
        said = "; ".join(sentence for sentence in (at.said, check_lora_keys(config)) if sentence)
        return Fitted(self.model_copy(update=fields), left_out, said or None)

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any]) -> LoRA | None:
        ours = config.get("peft_type") == "LORA" and not config.get("use_dora")
        return cls(**peft_fields(config)) if ours else None


def peft_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of this method in PEFT's `adapter_config.json`. Raises DataError: it uses something of PEFT's LoRA
    that would be lost here."""
    check_lora_keys(config)
    parameters = config.get("target_parameters") or []
    modules = config.get("target_modules") or ([] if parameters else ALL_LINEAR)  # its tensors say which linears
    return {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": modules if isinstance(modules, str) else tuple(sorted(modules)),
        "use_rslora": config.get("use_rslora", False),
        # the other starts leave the base as it is, and are over once there are weights
        "init_lora_weights": start if (start := str(config.get("init_lora_weights")).lower()) in STARTS else True,
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "target_parameters": tuple(sorted(parameters)),
    }


def _patterns_for(
    named: Sequence[str], patterns: Mapping[str, Number], default: Number, by_weight: Sequence[Linear]
) -> dict[str, Number]:
    """A config's patterns, where some linears are named by their weight: those get entries of their own where their
    names would be matched otherwise now. Without such linears, the patterns as they are."""
    if not by_weight:
        return dict(patterns)
    search = Search()
    exact = {
        f"{t.path}.weight": value
        for t in by_weight
        if (value := search.first(patterns, t.path, default)) != search.first(patterns, f"{t.path}.weight", default)
    }
    return exact | {key: value for key, value in patterns.items() if any(search.end(key, name) for name in named)}
