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
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from spectune.compute.low_rank_starts import orthonormal, principal
from spectune.deltas import (
    ALL_LINEAR,
    SWEEPS,
    TINKER,
    DeltaModule,
    Fitted,
    InitContext,
    Method,
    OutputModule,
    OutputSite,
    RatePoint,
    RateRule,
    Search,
    Site,
    check_lora_keys,
    check_patterns,
    checked_pattern,
    checked_targets,
    left_out,
    peft_targets,
    placed,
    same_targets,
    targets,
)  # fmt: skip
from spectune.errors import ConfigError, DataError
from spectune.families import Family, dense_weight
from spectune.families.quantised import is_plain

_PEFT_PREFIX = "base_model.model."
#: VeLoRA's, which only its backward pass looks at
_OF_TRAINING = ".lora_velora_embed"
Number = TypeVar("Number", int, float)
#: starts at factors of the base's weight, by PEFT's name
_STARTS = {"pissa": principal, "olora": orthonormal}


class LoRALayer(OutputModule):
    """`y + scale * B A dropout(x)` at one linear map."""

    acts_on = "weight"
    #: LoRA+: of `B`'s learning rate to `A`'s
    rate_ratio = 1.0

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

    def rate_factor(self, name: str) -> float:
        return self.rate_ratio if name == "lora_B" else 1.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(x)

    def change(self, x: Tensor) -> Tensor:
        """`scale * B A dropout(x)`, in the dtype of `x`."""
        # scaled on the small side: what is as wide as the output is then one product and one sum
        low = F.linear(self.dropout(x), (self.lora_A * self.scale).to(x.dtype))
        return F.linear(low, self.lora_B.to(x.dtype))

    def product(self) -> Tensor:
        """What is added to the weight, `[out, in]`, but for the scale."""
        return self.lora_B @ self.lora_A

    def changed(self, parameter: Tensor) -> Tensor:
        return parameter + (self.product() * self.scale).to(parameter.dtype)

    def merge_into(self, module: nn.Module) -> None:
        weight = module.weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ConfigError(f"{type(module).__name__} holds quantised weights: LoRA cannot be merged into them")
        change = self.product() * self.scale
        weight.data = (weight.float() + (change.T if isinstance(module, Conv1D) else change)).to(weight.dtype)


class StartedLoRALayer(LoRALayer):
    """`y + scale * (B A - B0 A0) x`, where `B0` and `A0` are made of the base's weight, and the first `B` and `A`.

    PEFT takes `scale * B0 A0` off the base's weight instead. What is small is computed as such, `(B - B0) A + B0 (A -
    A0)`: at the start it is exactly zero, and later no difference of two large products."""

    first_a: Tensor
    first_b: Tensor

    def __init__(self, site: OutputSite, r: int, scale: float, dropout: float, start: str) -> None:
        super().__init__(site, r, scale, dropout)
        if r > (most := min(site.in_features, site.out_features)):
            raise ConfigError(f"init_lora_weights={start!r} at {site.path}: r = {r} is more than its rank, {most}")
        self.start = start
        self.register_buffer("first_a", torch.empty(r, site.in_features), persistent=False)
        self.register_buffer("first_b", torch.empty(site.out_features, r), persistent=False)

    def on_attach(self, host: nn.Module) -> None:
        weight = dense_weight(host) if is_plain(host.weight) else None  # type: ignore[arg-type]
        if weight is None:
            raise ConfigError(
                f"init_lora_weights={self.start!r} starts at factors of the base's weights, and those of "
                f"{type(host).__name__} are quantised: the delta would be wrong on the base that they stand for. Use "
                "another start, or this base without quantisation"
            )
        with torch.no_grad():
            a, b = _STARTS[self.start](weight, self.lora_A.shape[0], self.scale)
            self.first_a.copy_(a)
            self.first_b.copy_(b)

    def initialise(self, generator: torch.Generator) -> None:
        self.lora_A.copy_(self.first_a)
        self.lora_B.copy_(self.first_b)

    def change(self, x: Tensor) -> Tensor:
        kept = self.dropout(x)
        down = torch.cat([self.lora_A, self.lora_A - self.first_a]) * self.scale
        up = torch.cat([self.lora_B - self.first_b, self.first_b], dim=1)
        made = F.linear(F.linear(kept, down.to(x.dtype)), up.to(x.dtype))
        if not self.training or isinstance(self.dropout, nn.Identity):
            return made
        # dropout is for what the trained factors see, not for `B0 A0 x`, which in PEFT is the base's
        lost = F.linear(x - kept, (self.first_a * self.scale).to(x.dtype))
        return made - F.linear(lost, self.first_b.to(x.dtype))

    def product(self) -> Tensor:
        return (self.lora_B - self.first_b) @ self.lora_A + self.first_b @ (self.lora_A - self.first_a)


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
    def _some_target(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return checked_targets(value)

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
        found = targets(family, self.target_modules)
        for field in ("rank_pattern", "alpha_pattern"):
            check_patterns(field, getattr(self, field), found)
        return [OutputSite(t.path, t.in_features, t.out_features) for t in found]

    def notice(self, family: Family) -> str | None:
        return left_out(family, self.target_modules)

    def build(self, site: Site) -> OutputModule:
        assert isinstance(site, OutputSite)
        given = site, self.rank(site.path), self.scale(site.path), self.lora_dropout
        start = str(self.init_lora_weights)
        layer = StartedLoRALayer(*given, start) if start in _STARTS else LoRALayer(*given)
        layer.rate_ratio = self.loraplus_lr_ratio or 1.0
        return layer

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        for _, module in modules:
            assert isinstance(module, LoRALayer)
            module.initialise(context.generator)
            if self.init_lora_weights == "gaussian":
                module.lora_A.normal_(0.0, 1 / module.lora_A.shape[0], generator=context.generator)

    # PEFT's layout: base_model.model.<module>.lora_A.weight [r, in], .lora_B.weight [out, r]

    def to_folder(self, state: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if family.conv1d and self.init_lora_weights == "olora":
            return super().to_folder(state, family)  # PEFT factors a Conv1D's weight as it lies, transposed
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.r,
            # readers annotate it as a whole number
            "lora_alpha": int(self.lora_alpha) if self.lora_alpha == int(self.lora_alpha) else self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": peft_targets([t.path for t in targets(family, self.target_modules)], family),
            "use_rslora": self.use_rslora,
            "fan_in_fan_out": family.conv1d,
            "bias": "none",
        }
        # only where they are used: older readers need not know them
        config |= {key: found for key in ("rank_pattern", "alpha_pattern") if (found := getattr(self, key))}
        config |= {"init_lora_weights": self.init_lora_weights} if self.init_lora_weights is not True else {}
        return config, {f"{_PEFT_PREFIX}{name}.weight": tensor for name, tensor in state.items()}

    def from_folder(self, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        if family.conv1d and self.init_lora_weights == "olora" and any(n.startswith(_PEFT_PREFIX) for n in tensors):
            raise DataError("this is PEFT's OLoRA on a Conv1D base, which it starts at the factors of another matrix")
        return {n.removeprefix(_PEFT_PREFIX).removesuffix(".weight"): tensor for n, tensor in tensors.items()}

    def fitted_to(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: Family) -> Fitted:
        at = placed(config, tensors, "lora_", family)
        search = Search()
        fields: dict[str, Any] = {"target_modules": same_targets(self.target_modules, at.paths, family)}
        for field in ("rank_pattern", "alpha_pattern"):
            matched = {key: [path for path in at.paths if search.end(key, path)] for key in getattr(self, field)}
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
    modules = config.get("target_modules") or ALL_LINEAR  # which linears these are, its tensors say
    return {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": modules if isinstance(modules, str) else tuple(sorted(modules)),
        "use_rslora": config.get("use_rslora", False),
        # the other starts leave the base as it is, and are over once there are weights
        "init_lora_weights": start if (start := str(config.get("init_lora_weights")).lower()) in _STARTS else True,
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
    }
