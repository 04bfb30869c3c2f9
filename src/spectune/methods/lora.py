"""LoRA: a low-rank change of linear maps.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3:
`h = W0 x + (alpha / r) B A x`, with `A` `[r, in]` random and `B` `[out, r]` zero, so that training starts at the base.
rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) scales by `alpha / sqrt(r)` instead.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from spectune.compute.low_rank import low_rank_sum
from spectune.deltas import (
    SWEEPS,
    TINKER,
    DeltaModule,
    InitContext,
    MatrixSite,
    Method,
    OutputModule,
    OutputSite,
    ParameterModule,
    RatePoint,
    RateRule,
    Site,
    expert_words,
    experts_left_out,
    parameters_named,
    peft_keys,
    told_apart,
)  # fmt: skip
from spectune.errors import ConfigError, DataError, some
from spectune.families import Family, Linear, Matrix

_PEFT_PREFIX = "base_model.model."
Number = TypeVar("Number", int, float)


class LoRALayer(OutputModule):
    """`y + scale * B A dropout(x)` at one linear map."""

    acts_on = "weight"

    def __init__(self, site: OutputSite, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, site.in_features))
        self.lora_B = nn.Parameter(torch.zeros(site.out_features, r))
        self.scale = scale
        # none is no module: a dropout of zero would copy its input, and keep the copy for backward
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def initialise(self, generator: torch.Generator) -> None:
        """`A` as in the paper's code and PEFT: Kaiming with a = sqrt(5), uniform within 1 / sqrt(in_features)."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(x)

    def change(self, x: Tensor) -> Tensor:
        """`scale * B A dropout(x)`, in the dtype of `x`."""
        # scaled on the small side: what is as wide as the output is then one product and one sum
        low = F.linear(self.dropout(x), (self.lora_A * self.scale).to(x.dtype))
        return F.linear(low, self.lora_B.to(x.dtype))

    def changed(self, parameter: Tensor) -> Tensor:
        return parameter + ((self.lora_B @ self.lora_A) * self.scale).to(parameter.dtype)

    def merge_into(self, module: nn.Module) -> None:
        weight = module.weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ConfigError(f"{type(module).__name__} holds quantised weights: LoRA cannot be merged into them")
        change = (self.lora_B @ self.lora_A) * self.scale
        weight.data = (weight.float() + (change.T if isinstance(module, Conv1D) else change)).to(weight.dtype)


class LoRAMatrix(ParameterModule):
    """`W + scale * B A` in the place of a parameter that is a matrix, or one for each expert.

    As PEFT stores them: `lora_A` `[matrices * r, in_features]`, expert after expert, `lora_B` `[out_features, r *
    matrices]`, where the experts' columns of one rank stand together."""

    def __init__(self, site: MatrixSite, r: int, scale: float) -> None:
        super().__init__()
        self.several, self.transposed, self.scale = len(site.shape) == 3, site.transposed, scale
        self.count = site.shape[0] if self.several else 1
        out_features, in_features = site.shape[:-3:-1] if site.transposed else site.shape[-2:]
        self.lora_A = nn.Parameter(torch.empty(self.count * r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r * self.count))

    def initialise(self, generator: torch.Generator) -> None:
        """As a linear's."""
        LoRALayer.initialise(self, generator)  # type: ignore[arg-type]

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`(left, right)`, whose product is the change in the parameter's own shape."""
        first = (self.lora_A * self.scale).to(dtype).view(self.count, -1, self.lora_A.shape[1])
        second = self.lora_B.to(dtype).view(self.lora_B.shape[0], -1, self.count).permute(2, 0, 1).contiguous()
        left, right = (first.mT, second.mT) if self.transposed else (second, first)
        return (left, right) if self.several else (left[0], right[0])

    def changed(self, parameter: Tensor) -> Tensor:
        left, right = self.factors(torch.float32)
        return (parameter.float() + left @ right).to(parameter.dtype)

    def in_place_of(self, parameter: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(parameter) not in (nn.Parameter, Tensor):
            return self.changed(parameter)  # the compiler does not follow tensors of other classes
        return low_rank_sum(parameter, *self.factors(parameter.dtype))


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

    @field_validator("target_modules")
    @classmethod
    def _target(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return value if isinstance(value, tuple) or value in ("all-linear", "") else _safe_pattern(value)

    @model_validator(mode="after")
    def _some_target(self) -> Self:
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules is empty: nothing would be trained")
        if self.target_parameters and self.lora_dropout:
            raise ValueError(
                "lora_dropout cannot act on target_parameters, whose inputs the base keeps to itself (PEFT refuses "
                "both together): set lora_dropout to 0"
            )
        return self

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, Number]) -> dict[str, Number]:
        return {_safe_pattern(key): item for key, item in value.items()}

    def rank(self, path: str) -> int:
        """The rank at the linear at `path`."""
        return _first(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        """The factor of `B A` at the linear at `path`."""
        rank, alpha = self.rank(path), _first(self.alpha_pattern, path, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def sites(self, family: Family) -> list[Site]:
        linears, by_weight, matrices = self._targets(family)
        for field in ("rank_pattern", "alpha_pattern"):
            paths = [*(t.path for t in linears), *(f"{t.path}.weight" for t in by_weight), *(m.where for m in matrices)]
            for key in getattr(self, field):
                if not any(_matches(key, path) for path in paths):
                    ends = sorted({path.rpartition(".")[2] for path in paths})
                    near = difflib.get_close_matches(key, ends, n=1, cutoff=0)
                    raise ConfigError(
                        f"{field}: {key!r} matches none of the targets"
                        + (f"; the nearest is {near[0]!r}" if near else "")
                    )
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

    def build(self, site: Site) -> DeltaModule:
        if isinstance(site, MatrixSite):
            return LoRAMatrix(site, self.rank(site.path), self.scale(site.path))
        assert isinstance(site, OutputSite)
        named = f"{site.path}.weight" if isinstance(site, _WeightSite) else site.path
        return LoRALayer(site, self.rank(named), self.scale(named), self.lora_dropout)

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        for _, module in modules:
            assert isinstance(module, LoRALayer | LoRAMatrix)
            module.initialise(context.generator)

    def notice(self, family: Family) -> str | None:
        named = self.target_modules
        if named != "all-linear" and not (named and expert_words(family, named)):
            return None  # who names other modules wants these
        return experts_left_out(family, self._targets(family)[2])

    # PEFT's layout: base_model.model.<module>.lora_A.weight [r, in], .lora_B.weight [out, r]

    def to_folder(self, state: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        modules = self.target_modules
        linears, by_weight, matrices = self._targets(family)
        plain, mistaken = told_apart(family, linears)
        # by whole names: an end could name something beside the text's layers too
        parameters = sorted([*(f"{t.path}.weight" for t in (*mistaken, *by_weight)), *(m.where for m in matrices)])
        if mistaken:
            modules = tuple(_endings(plain))
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.r,
            # readers annotate it as a whole number
            "lora_alpha": int(self.lora_alpha) if self.lora_alpha == int(self.lora_alpha) else self.lora_alpha,
            "lora_dropout": 0.0 if parameters else self.lora_dropout,  # PEFT reads no dropout beside parameters
            "target_modules": _endings(family.linears) if modules == "all-linear" else modules or [],
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
        keys = self._matrix_keys(family)
        return config, {f"{_PEFT_PREFIX}{keys.get(name, name)}.weight": tensor for name, tensor in state.items()}

    def from_folder(self, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        ours = {theirs: name for name, theirs in self._matrix_keys(family).items()}
        plain = {n.removeprefix(_PEFT_PREFIX).removesuffix(".weight"): tensor for n, tensor in tensors.items()}
        return {ours.get(name, name): tensor for name, tensor in plain.items()}

    def _matrix_keys(self, family: Family) -> dict[str, str]:
        """PEFT's names of the weights at matrices, by ours."""
        sites = [site for site in self.sites(family) if isinstance(site, MatrixSite)] if self.target_parameters else []
        wrappers = peft_keys(sites)
        return {f"{path}.{leaf}": f"{at}.{leaf}" for path, at in wrappers.items() for leaf in ("lora_A", "lora_B")}

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any]) -> LoRA | None:
        ours = config.get("peft_type") == "LORA" and not config.get("use_dora")
        return cls(**peft_fields(config)) if ours else None


def peft_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of this method in PEFT's `adapter_config.json`. Raises DataError: it uses something of PEFT's LoRA
    that would be lost here."""
    beyond = ("modules_to_save", "layers_to_transform", "layer_replication", "lora_bias",
              "exclude_modules", "trainable_token_indices", "alora_invocation_tokens", "use_qalora")  # fmt: skip
    used = [key for key in beyond if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise DataError(
            f"this LoRA uses {', '.join(used)}, which spectune cannot load: its answers would not be the same"
        )
    parameters = config.get("target_parameters") or []
    modules = config["target_modules"] if not parameters else config.get("target_modules") or []
    return {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": modules if isinstance(modules, str) else tuple(sorted(modules)),
        "use_rslora": config.get("use_rslora", False),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "target_parameters": tuple(sorted(parameters)),
    }


def _safe_pattern(pattern: str) -> str:
    """A regular expression that may come from anybody's folder: it must compile, and hold no repetition of a
    repetition, `(a+)*`, on which Python's `re` can take longer than anybody waits."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    if len(pattern) > 500 or re.search(r"[+*}]\??\)[+*{]", pattern):
        raise ValueError(
            f"{pattern[:80]!r} repeats what is repeated itself, or is longer than 500 characters: it could hang"
        )
    return pattern


def _patterns_for(
    named: Sequence[str], patterns: Mapping[str, Number], default: Number, by_weight: Sequence[Linear]
) -> dict[str, Number]:
    """A config's patterns, where some linears are named by their weight: those get entries of their own where their
    names would be matched otherwise now. Without such linears, the patterns as they are."""
    if not by_weight:
        return dict(patterns)
    exact = {
        f"{t.path}.weight": value
        for t in by_weight
        if (value := _first(patterns, t.path, default)) != _first(patterns, f"{t.path}.weight", default)
    }
    return exact | {key: value for key, value in patterns.items() if any(_matches(key, name) for name in named)}


def _first(patterns: Mapping[str, Number], path: str, default: Number) -> Number:
    """The value of the first pattern that matches a path."""
    return next((value for key, value in patterns.items() if _matches(key, path)), default)


def _matches(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def targets(family: Family, wanted: str | tuple[str, ...]) -> list[Linear]:
    """The linears that `target_modules` names. Raises ConfigError: a name that matches no linear, with the nearest real
    one."""
    if wanted == "all-linear":
        return list(family.linears)
    if isinstance(wanted, str):
        found = [t for t in family.linears if re.fullmatch(wanted, t.path)]
        missing = [] if found else [wanted]
    else:
        found = [t for t in family.linears if any(f".{t.path}".endswith(f".{name}") for name in wanted)]
        missing = [name for name in wanted if not any(f".{t.path}".endswith(f".{name}") for t in found)]
    if missing:
        known = _endings(family.linears)
        near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0) for name in missing}
        raise ConfigError(
            "\n".join(
                f"target_modules: {name!r} matches no linear of this {family.model_type} model"
                + (
                    f": {words}"
                    if (words := expert_words(family, name))
                    else f"; the nearest is {near[name][0]!r}"
                    if near[name]
                    else ""
                )
                for name in missing
            )
            + f"\nIts linears end in: {', '.join(known)}"
        )
    return found


def _endings(linears: list[Linear] | tuple[Linear, ...]) -> list[str]:
    return sorted({linear.path.rpartition(".")[2] for linear in linears})
