"""OFT: turn the input of each linear map by an orthogonal matrix, block by block.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280, and, on the input's
side and with a series in place of the inverse, Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", arXiv 2506.19847
(OFTv2): `y = W R x + b`. `R` is block-diagonal; each block is the Cayley transform `(I + Q)(I - Q)^-1` of a skew matrix
`Q`, which is zero at the start. With `use_cayley_neumann` the inverse is cut off after some terms of its Neumann
series, so that `R` is orthogonal for small turns only. Angles between a layer's neurons are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectune.deltas import (
    SWEEPS,
    DeltaModule,
    EntryModule,
    Fitted,
    InitContext,
    Kind,
    Method,
    Operands,
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
from spectune.errors import ConfigError, DataError
from spectune.families import Family

#: of PEFT's config; `module_dropout` never reaches a forward pass of its linears, `eps` belongs to `coft`
_PEFT_KEYS = ("r", "oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms", "block_share", "bias", "eps",
              "fan_in_fan_out", "init_weights", "module_dropout")  # fmt: skip


class Rotation(EntryModule):
    """`x R`: `oft_R` `[blocks, size (size - 1) / 2]` holds the upper triangles of the skew matrices, as PEFT's does."""

    acts_on = "weight"
    upper: Tensor

    def __init__(self, size: int, blocks: int, terms: int) -> None:
        super().__init__()
        self.oft_R = nn.Parameter(torch.zeros(blocks, size * (size - 1) // 2))
        self.size, self.terms = size, terms
        self.register_buffer("upper", _upper_triangle(size, self.oft_R.device), persistent=False)

    def turn(self) -> Tensor:
        """`R - I`, `[blocks, size, size]`, float32: what is small stays exact in the base's dtype."""
        triangle = self.oft_R.new_zeros(len(self.oft_R), self.size, self.size)
        triangle[:, self.upper[0], self.upper[1]] = self.oft_R
        skew = triangle - triangle.transpose(1, 2)
        if not self.terms:  # PEFT's exact form turns the other way
            eye = torch.eye(self.size, device=skew.device)
            exact: Tensor = torch.linalg.solve_ex(eye + skew, -2 * skew, left=False)[0]
            return exact
        made = 2 * skew
        if self.terms > 2:  # PEFT's series: the last power counts once, and is never below the third
            power = skew @ skew
            made = made + 2 * power
            for _ in range(3, self.terms - 1):
                power = power @ skew
                made = made + 2 * power
            made = made + power @ skew
        return made

    def forward(self, x: Tensor) -> Tensor:
        return x + self._by_block(x, self.turn().to(x.dtype))

    costly = True

    def has_row_form(self) -> bool:
        return True

    def operands(self) -> dict[str, Tensor]:
        return {"turn": self.turn()}

    def alike(self) -> Kind:
        return Kind(Rotation, (len(self.oft_R), self.size))  # sizes that zeros do not fill up

    @staticmethod
    def by_row(operands: Operands, x: Tensor, blocks: int, size: int) -> Tensor:
        apart = x.reshape(*x.shape[:-1], -1, size)
        turned = torch.einsum("btnk,bnkc->btnc", apart, operands["turn"].to(x.dtype))
        return x + turned.flatten(-2)

    def changed(self, parameter: Tensor) -> Tensor:
        return parameter + self._by_block(parameter, self.turn().transpose(1, 2).to(parameter.dtype))

    def merge_into(self, module: nn.Module) -> None:
        weight = module.weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ConfigError(f"{type(module).__name__} holds quantised weights: OFT cannot be merged into them")
        transposed = isinstance(module, Conv1D)
        merged = self.changed(weight.float().T if transposed else weight.float())
        weight.data = (merged.T.contiguous() if transposed else merged).to(weight.dtype)

    def _by_block(self, x: Tensor, blocks: Tensor) -> Tensor:
        """Each `size` features of `x` times their block; one block serves all where there is one."""
        apart = x.reshape(*x.shape[:-1], -1, self.size)
        turned = apart @ blocks[0] if len(blocks) == 1 else torch.einsum("...rk,rkc->...rc", apart, blocks)
        return turned.flatten(-2)


def _upper_triangle(size: int, device: torch.device) -> Tensor:
    """Its rows and columns. Where nothing but shapes is counted torch makes them in hundreds of slow steps."""
    if device.type == "meta":
        return torch.empty(2, size * (size - 1) // 2, dtype=torch.long, device=device)
    return torch.triu_indices(size, size, 1)


class OFT(Method):
    """Orthogonal fine-tuning of linear maps (Qiu et al. 2023, 2025).

    Attributes:
        oft_block_size: features that are turned together. Where it does not divide a linear's input, the nearest number
            that does is taken, as in PEFT.
        r: blocks a linear, in place of `oft_block_size`, which must be 0 then.
        use_cayley_neumann: a series in place of the inverse: fast, and orthogonal for small turns only.
        num_cayley_neumann_terms: of that series, the first included.
        block_share: one block for all of a linear's input.
        target_modules: as `LoRA`'s.
    """

    name: Literal["oft"] = "oft"
    oft_block_size: int = Field(32, ge=0)
    r: int = Field(0, ge=0)
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = Field(5, ge=2, le=64)
    block_share: bool = False
    target_modules: str | tuple[str, ...] = "all-linear"

    label: ClassVar[str] = "OFT"
    best_for: ClassVar[str] = "keeping what the base knows; merges away at inference"
    learning_rates: ClassVar[RateRule] = RateRule((
        RatePoint(224, 2.5e-3, SWEEPS),
        RatePoint(448, 6e-3, SWEEPS),
        RatePoint(4096, 4e-4, "OFTv2's settings for Llama-2-7B (2e-4 and 8e-4)", strong=False),
    ))  # fmt: skip
    can_merge: ClassVar[bool] = True

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return checked_targets(value)

    @model_validator(mode="after")
    def _one_of_both(self) -> OFT:
        if bool(self.r) == bool(self.oft_block_size):
            raise ValueError("give r or oft_block_size and set the other one to 0: their product is a linear's input")
        return self

    def blocks(self, in_features: int) -> tuple[int, int]:
        """How many blocks a linear's input is cut into, and the features of each."""
        near = _nearest_divisor(in_features, self.r or self.oft_block_size)
        return (near, in_features // near) if self.r else (in_features // near, near)

    def sites(self, family: Family) -> list[Site]:
        found = targets(family, self.target_modules)
        return [OutputSite(t.path, t.in_features, t.out_features, entry=True) for t in found]

    def build(self, site: Site) -> Rotation:
        assert isinstance(site, OutputSite)
        count, size = self.blocks(site.in_features)
        terms = self.num_cayley_neumann_terms if self.use_cayley_neumann else 0
        return Rotation(size, 1 if self.block_share else count, terms)

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        """Turns are none from the start."""

    def notice(self, family: Family) -> str | None:
        said = [linears_alone(family, self.target_modules), self._other_sizes(family)]
        return "; ".join(sentence for sentence in said if sentence) or None

    def _other_sizes(self, family: Family) -> str | None:
        wanted = self.r or self.oft_block_size
        inputs = {site.in_features for site in self.sites(family) if isinstance(site, OutputSite)}
        odd = {size: _nearest_divisor(size, wanted) for size in sorted(inputs) if size % wanted}
        if not odd:
            return None
        field = "r" if self.r else "oft_block_size"
        return f"{field} = {wanted} does not divide some inputs, where the nearest that does is taken: " + ", ".join(
            f"{near} of {size}" for size, near in odd.items()
        )

    # PEFT's layout: base_model.model.<module>.oft_R.weight [blocks, size (size - 1) / 2]

    def to_folder(self, state: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if family.conv1d:
            return super().to_folder(state, family)  # PEFT's OFT takes no Conv1D
        config = {
            "peft_type": "OFT",
            "peft_version": "0.18.0",  # since when its series is the one above: without it, readers warn
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.r,
            "oft_block_size": self.oft_block_size,
            "use_cayley_neumann": self.use_cayley_neumann,
            "num_cayley_neumann_terms": self.num_cayley_neumann_terms,
            "block_share": self.block_share,
            "target_modules": peft_targets([t.path for t in targets(family, self.target_modules)], family),
            "bias": "none",
        }
        return config, {f"{PREFIX}{name}.weight": tensor for name, tensor in state.items()}

    def from_folder(self, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        return {n.removeprefix(PREFIX).removesuffix(".weight"): tensor for n, tensor in tensors.items()}

    def fitted_to(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: Family) -> Fitted:
        at = placed(config, tensors, "oft_", family)
        found = self.model_copy(update={"target_modules": same_targets(self.target_modules, at.paths, family)})
        return Fitted(found, at.left_out, at.said)

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any]) -> OFT | None:
        if config.get("peft_type") != "OFT":
            return None
        check_keys(config, "OFT", _PEFT_KEYS, beyond=("coft", "modules_to_save"))
        neumann = config.get("use_cayley_neumann", False)
        if neumann and _version(config.get("peft_version")) < (0, 18):
            raise DataError(
                "this OFT is of a PEFT before 0.18.0, whose Cayley-Neumann series was another one: load it with PEFT "
                "0.17, merge it there, or train again"
            )
        modules = config["target_modules"]
        return cls(
            oft_block_size=config["oft_block_size"],
            r=config.get("r", 0),
            use_cayley_neumann=neumann,
            num_cayley_neumann_terms=config.get("num_cayley_neumann_terms", 5),
            block_share=config.get("block_share", False),
            target_modules=modules if isinstance(modules, str) else tuple(sorted(modules)),
        )


def _nearest_divisor(whole: int, wanted: int) -> int:
    """The divisor of `whole` that is nearest to `wanted`, the smaller one of two: PEFT's `adjust_oft_parameters`."""
    if wanted >= whole:
        return whole
    higher = next(number for number in range(wanted, whole + 1) if whole % number == 0)
    lower = next(number for number in range(wanted, 0, -1) if whole % number == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _version(text: Any) -> tuple[int, ...]:
    """The first two numbers of a version; none at all comes before all."""
    parts = str(text or "0.0").partition("@")[0].split(".")[:2]
    return tuple(int(part) if part.isdigit() else 0 for part in parts)
