"""MiSS: one trained matrix a linear map, shared by all shards of its input.

Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", arXiv 2409.15371:
the input is cut into shards of `r` features, and the same `D` `[r, out]` maps each of them, so that
`y = W x + D^T (x_1 + x_2 + ...)`: LoRA whose `A` is fixed, of zeros and ones. `D` is zero at the start. "mini" repeats
a narrower `D` over the outputs. "bat" multiplies blocks of the base's weight, `W' = W + W_ij B_i + B_i`, and needs the
weight in every product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from spectune.compute.row_products import row_products
from spectune.deltas import (
    SWEEPS,
    DeltaModule,
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
    check_keys,
    checked_targets,
    linears_alone,
    peft_targets,
    placed,
    same_targets,
    targets,
)  # fmt: skip
from spectune.deltas.peft_config import PREFIX
from spectune.errors import ConfigError
from spectune.families import Family, dense_weight


class SharedShards(OutputModule):
    """`y + fold(x) D`: `fold` sums the shards, of `r` features each, the last one filled up with zeros."""

    acts_on = "weight"

    def __init__(self, site: OutputSite, method: MiSS) -> None:
        super().__init__()
        self.in_features, self.out_features = site.in_features, site.out_features
        self.r = min(method.r, site.in_features)
        width = method.mini_r if method.init_weights == "mini" else site.out_features
        self.miss_block = nn.Parameter(torch.zeros(self.r, width))
        # none is no module: a dropout of zero would copy its input, and keep the copy for backward
        self.dropout = nn.Dropout(method.miss_dropout) if method.miss_dropout else nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        filled = F.pad(self.dropout(x), (0, -self.in_features % self.r))
        folded = filled.reshape(*x.shape[:-1], -1, self.r).sum(-2)
        return y + folded @ self.block().to(x.dtype)

    def operands(self) -> dict[str, Tensor] | None:
        return {"block": self.block()}

    def alike(self) -> Kind:
        return Kind(type(self), (self.r,), self.dropout.p if isinstance(self.dropout, nn.Dropout) else 0.0)

    @staticmethod
    def by_row(operands: Operands, x: Tensor, y: Tensor, r: int) -> Tensor:
        filled = F.pad(x, (0, -x.shape[-1] % r))
        folded = filled.reshape(*x.shape[:-1], -1, r).sum(-2)
        return y + row_products(operands["block"].mT, folded)

    def block(self) -> Tensor:
        """`D`, `[r, out_features]`."""
        return self.miss_block.repeat(1, self.out_features // self.miss_block.shape[1])

    def change(self, weight: Tensor) -> Tensor:
        """What is added to `weight` `[out_features, in_features]`."""
        shards = -(-self.in_features // self.r)
        return self.block().T.repeat(1, shards)[:, : self.in_features]

    def changed(self, parameter: Tensor) -> Tensor:
        return parameter + self.change(parameter).to(parameter.dtype)

    def merge_into(self, module: nn.Module) -> None:
        weight = module.weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ConfigError(f"{type(module).__name__} holds quantised weights: MiSS cannot be merged into them")
        dense = weight.float().T if isinstance(module, Conv1D) else weight.float()
        merged = dense + self.change(dense)
        weight.data = (merged.T if isinstance(module, Conv1D) else merged).contiguous().to(weight.dtype)


class BlockTransform(SharedShards):
    """`y + (W_ij B_i + B_i) x`, all blocks `r` by `r`: `miss_block` `[out_features / r, r, r]`."""

    def __init__(self, site: OutputSite, method: MiSS) -> None:
        super().__init__(site, method)
        self.miss_block = nn.Parameter(torch.zeros(site.out_features // self.r, self.r, self.r))

    def on_attach(self, host: nn.Module) -> None:
        if dense_weight(host) is None:
            raise ConfigError(
                f"MiSS 'bat' reads the base's weights, and {type(host).__name__} holds quantised ones that spectune "
                "cannot decode: use init_weights=True on this base"
            )
        self._host = [host]  # in a list: it is the model's child, not this module's

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight = dense_weight(self._host[0])
        assert weight is not None, "on_attach has seen it"
        return y + F.linear(x, self.change(weight).to(x.dtype))

    def operands(self) -> None:
        """None: they would be matrices as large as the base's."""
        return None

    def change(self, weight: Tensor) -> Tensor:
        r = self.r
        outputs, inputs = weight.shape
        blocks = weight.to(self.miss_block.dtype).reshape(outputs // r, r, inputs // r, r).permute(2, 0, 1, 3)
        made: Tensor = blocks @ self.miss_block + self.miss_block  # [in / r, out / r, r, r]
        return made.permute(1, 2, 0, 3).reshape(weight.shape)


class MiSS(Method):
    """Matrix shard sharing (Kang and Yin 2024).

    Attributes:
        r: features of a shard, at most all of a linear's input. With twice LoRA's rank it has as many weights on a
            square map.
        miss_dropout: dropout on the input, in training ("bat" has none, as in PEFT).
        mini_r: width of the matrix with "mini", a divisor of the linears' outputs.
        init_weights: True for the efficient form, "mini" or "bat" for the others; all start at zero.
        target_modules: as `LoRA`'s.
    """

    name: Literal["miss"] = "miss"
    r: int = Field(32, ge=1)
    miss_dropout: float = Field(0.0, ge=0, lt=1)
    mini_r: int = Field(1, ge=1)
    init_weights: Literal[True, "mini", "bat"] = True
    target_modules: str | tuple[str, ...] = "all-linear"

    label: ClassVar[str] = "MiSS"
    best_for: ClassVar[str] = "LoRA's place where memory and time in training are short"
    learning_rates: ClassVar[RateRule] = RateRule((
        RatePoint(224, 2e-3, SWEEPS),
        RatePoint(448, 4e-3, SWEEPS),
        RatePoint(4096, 1e-4, "PEFT's and its authors' settings (1e-4 and 2e-5)", strong=False),
    ))  # fmt: skip
    can_merge: ClassVar[bool] = True

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return checked_targets(value)

    @model_validator(mode="after")
    def _mini_where_used(self) -> MiSS:
        if self.mini_r != 1 and self.init_weights != "mini":
            raise ValueError("mini_r is for init_weights='mini'")
        return self

    def sites(self, family: Family) -> list[Site]:
        found = targets(family, self.target_modules)
        sizes = sorted({(t.in_features, t.out_features) for t in found})
        for inputs, outputs in sizes:
            if self.init_weights == "bat" and (inputs % self.r or outputs % self.r):
                raise ConfigError(
                    f"MiSS 'bat' cuts weights into blocks of {self.r} by {self.r} (r), and some linear is {outputs} by "
                    f"{inputs}: choose an r that divides both, or other target_modules"
                )
            if self.init_weights == "mini" and outputs % self.mini_r:
                raise ConfigError(f"miss.mini_r = {self.mini_r} does not divide the {outputs} outputs of some linear")
        return [OutputSite(t.path, t.in_features, t.out_features) for t in found]

    def notice(self, family: Family) -> str | None:
        return linears_alone(family, self.target_modules)

    def build(self, site: Site) -> SharedShards:
        assert isinstance(site, OutputSite)
        return (BlockTransform if self.init_weights == "bat" else SharedShards)(site, self)

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        """All zero from the start."""

    # PEFT's layout: base_model.model.<module>.miss_block

    def to_folder(self, state: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        narrow = any(t.in_features < self.r for t in targets(family, self.target_modules))
        if family.conv1d or narrow:
            return super().to_folder(state, family)  # PEFT's MiSS takes no Conv1D, and no shard wider than the input
        config = {
            "peft_type": "MISS",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.r,
            "miss_dropout": self.miss_dropout,
            "mini_r": self.mini_r,
            "init_weights": self.init_weights,
            "target_modules": peft_targets([t.path for t in targets(family, self.target_modules)], family),
            "bias": "none",
        }
        return config, {f"{PREFIX}{name}": tensor for name, tensor in state.items()}

    def from_folder(self, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}

    def fitted_to(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: Family) -> Fitted:
        at = placed(config, tensors, "miss_", family)
        found = self.model_copy(update={"target_modules": same_targets(self.target_modules, at.paths, family)})
        return Fitted(found, at.left_out, at.said)

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any]) -> MiSS | None:
        if config.get("peft_type") != "MISS":
            return None
        check_keys(config, "MiSS", ("r", "miss_dropout", "mini_r", "init_weights", "bias"))
        modules, kind = config["target_modules"], config.get("init_weights", True)
        return cls(
            r=config["r"],
            miss_dropout=config.get("miss_dropout", 0.0),
            mini_r=config.get("mini_r", 1) if kind == "mini" else 1,
            init_weights=kind or True,  # False is a random start of the efficient form
            target_modules=modules if isinstance(modules, str) else tuple(sorted(modules)),
        )
