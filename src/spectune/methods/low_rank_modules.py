"""The modules of LoRA and its kin: a low-rank change at a linear map, or in a parameter's own place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from spectune.compute.low_rank import low_rank_sum
from spectune.compute.low_rank_starts import orthonormal, principal
from spectune.compute.row_products import row_products
from spectune.deltas import Kind, MatrixSite, Operands, OutputModule, OutputSite, ParameterModule, Stacking
from spectune.errors import ConfigError
from spectune.families import dense_weight
from spectune.families.quantised import is_plain

#: starts at factors of the base's weight, by PEFT's name
STARTS = {"pissa": principal, "olora": orthonormal}


class LoRALayer(OutputModule):
    """`y + scale * B A dropout(x)` at one linear map."""

    acts_on = "weight"
    #: LoRA+: of `B`'s learning rate to `A`'s
    rate_ratio = 1.0

    def __init__(self, site: OutputSite, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, site.in_features))
        self.lora_B = nn.Parameter(torch.zeros(site.out_features, r))
        self.r, self.scale = r, scale
        # none is no module: a dropout of zero would copy its input, and keep the copy for backward
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def initialise(self, generator: torch.Generator) -> None:
        """The first `A`; `B` is zero already."""
        _kaiming(self.lora_A, generator)

    def rate_factor(self, name: str) -> float:
        return self.rate_ratio if name == "lora_B" else 1.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(x)

    def change(self, x: Tensor) -> Tensor:
        """`scale * B A dropout(x)`, in the dtype of `x`."""
        # scaled on the small side: what is as wide as the output is then one product and one sum
        low = F.linear(self.dropout(x), (self.lora_A * self.scale).to(x.dtype))
        return F.linear(low, self.lora_B.to(x.dtype))

    def operands(self) -> dict[str, Tensor]:
        own = self.factors_by_row()
        return {**own, "down": own["down"] * self.scale}

    def factors_by_row(self) -> dict[str, Tensor]:
        """The operands but for the scale."""
        own: dict[str, Any] = self._parameters  # without nn.Module's lookup, which is most of it for many deltas
        return {"down": own["lora_A"], "up": own["lora_B"]}

    @staticmethod
    def stacked(modules: Sequence[LoRALayer], stack: Stacking) -> dict[str, Tensor]:
        each = [module.factors_by_row() for module in modules]
        made = {name: stack([factors[name] for factors in each]) for name in each[0]}
        scales = [module.scale for module in modules]
        alike = len(set(scales)) == 1
        # once for all
        scale: float | Tensor = scales[0] if alike else stack.column(scales, made["down"].device)
        return {**made, "down": made["down"] * scale}

    def alike(self) -> Kind:
        dropout = self.dropout.p if isinstance(self.dropout, nn.Dropout) else 0.0
        return Kind(LoRALayer, dropout=dropout)

    @staticmethod
    def by_row(operands: Operands, x: Tensor, y: Tensor) -> Tensor:
        return row_products(operands["up"], row_products(operands["down"], x), y)

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
            a, b = STARTS[self.start](weight, self.lora_A.shape[0], self.scale)
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

    def factors_by_row(self) -> dict[str, Tensor]:
        down = torch.cat([self.lora_A, self.lora_A - self.first_a])
        return {"down": down, "up": torch.cat([self.lora_B - self.first_b, self.first_b], dim=1)}

    def product(self) -> Tensor:
        return (self.lora_B - self.first_b) @ self.lora_A + self.first_b @ (self.lora_A - self.first_a)


class LoRAMatrix(ParameterModule):
    """`W + scale * B A` in the place of a parameter that is a matrix, or one for each expert.

    As PEFT stores them: `lora_A` `[matrices * r, in_features]`, expert after expert, `lora_B` `[out_features, r *
    matrices]`, where the experts' columns of one rank stand together."""

    def __init__(self, site: MatrixSite, r: int, scale: float, rate_ratio: float = 1.0) -> None:
        super().__init__()
        self.r, self.scale, self.rate_ratio = r, scale, rate_ratio
        self.several, self.transposed = len(site.shape) == 3, site.transposed
        self.count = site.shape[0] if self.several else 1
        out_features, in_features = site.shape[:-3:-1] if site.transposed else site.shape[-2:]
        self.lora_A = nn.Parameter(torch.empty(self.count * r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r * self.count))

    def initialise(self, generator: torch.Generator) -> None:
        """As a linear's."""
        _kaiming(self.lora_A, generator)

    def rate_factor(self, name: str) -> float:
        return self.rate_ratio if name == "lora_B" else 1.0

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
            return self.changed(parameter)  # the compiler loses the change in grouped products, without an error
        return low_rank_sum(parameter, *self.factors(parameter.dtype))


def low_rank_change(operands: Operands, x: Tensor) -> Tensor:
    """`up down x` of each row, in the dtype of `x`. `down`: `[rows, r, in_features]`, `up`: `[rows, out_features, r]`,
    `x`: `[rows, tokens, in_features]`."""
    return row_products(operands["up"], row_products(operands["down"], x))


def _kaiming(weight: nn.Parameter, generator: torch.Generator) -> None:
    """As in the paper's code and PEFT: Kaiming with a = sqrt(5), uniform within 1 / sqrt(in_features)."""
    bound = 1 / math.sqrt(weight.shape[1])
    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
