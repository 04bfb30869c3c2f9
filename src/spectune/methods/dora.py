"""DoRA: LoRA on the direction of each weight row, and a trained magnitude for it.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equation 5:
`W' = m (W0 + s B A) / ||W0 + s B A||`, the norm taken over each output's row; `m` starts as `||W0||`, so that training
starts at the base. The norm is held constant in the gradient (their section 4.3).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectune.compute.magnitude import scale_features
from spectune.deltas import DeltaModule, InitContext, Kind, Operands, OutputModule, OutputSite, Site
from spectune.errors import ConfigError
from spectune.families import Family, dense_weight
from spectune.methods.lora import LoRA, peft_fields
from spectune.methods.low_rank_modules import LoRALayer, low_rank_change

_MAGNITUDE = ".lora_magnitude_vector"


class DoRALayer(OutputModule):
    """`y + (m / n - 1) (y - bias) + (m / n) s B A x` with `n = ||W0 + s B A||` for each output."""

    def __init__(self, lora: LoRALayer, *, overwritten: bool = False) -> None:
        super().__init__()
        self.lora, self.overwritten = lora, overwritten
        self.magnitude = nn.Parameter(torch.zeros(lora.lora_B.shape[0]))

    def on_attach(self, host: nn.Module) -> None:
        if dense_weight(host) is None:
            raise ConfigError(
                f"DoRA reads the base's weights, and {type(host).__name__} holds quantised ones that spectune cannot "
                "decode: use LoRA on this base"
            )
        self._host = [host]  # in a list: it is the model's child, not this module's

    def rate_factor(self, name: str) -> float:
        return 1.0 if name == "lora.lora_A" else self.lora.rate_ratio  # vectors go with B, as in PEFT

    def row_norms(self) -> Tensor:
        """`||W0 + s B A||`, `[out_features]`, float32, constant in the gradient."""
        with torch.no_grad():
            norms: Tensor = torch.linalg.vector_norm(self._weight(), dim=1)
        return norms

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        ratio = self.magnitude / self.row_norms()
        made = scale_features(y, self.lora.change(x), ratio, getattr(self._host[0], "bias", None))
        return made.clone() if self.overwritten else made  # its backward pass keeps `made`

    def operands(self) -> dict[str, Tensor]:
        bias = getattr(self._host[0], "bias", None)
        own = {**self.lora.operands(), "ratio": self.magnitude / self.row_norms()}
        return own if bias is None else {**own, "bias": bias}

    costly = True

    def has_row_form(self) -> bool:
        return True

    def unchanging(self) -> dict[str, Tensor]:
        own, bias = self.lora.operands(), getattr(self._host[0], "bias", None)
        own |= {"up": torch.zeros_like(own["up"]), "ratio": torch.ones_like(self.magnitude)}
        return own if bias is None else {**own, "bias": bias}

    def alike(self) -> Kind:
        return Kind(DoRALayer, (self.overwritten,), self.lora.alike().dropout)

    @staticmethod
    def by_row(operands: Operands, x: Tensor, y: Tensor, overwritten: bool) -> Tensor:
        bias, change = operands.get("bias"), low_rank_change(operands, x)
        made = scale_features(y, change, operands["ratio"][:, None], None if bias is None else bias[:, None])
        return made.clone() if overwritten else made

    acts_on = "weight"

    def changed(self, parameter: Tensor) -> Tensor:
        full = parameter.float() + self.lora.scale * (self.lora.lora_B @ self.lora.lora_A)
        norms = torch.linalg.vector_norm(full, dim=1).detach()
        made: Tensor = ((self.magnitude / norms)[:, None] * full).to(parameter.dtype)
        return made

    def merge_into(self, module: nn.Module) -> None:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        merged = (self.magnitude / self.row_norms())[:, None] * self._weight()
        weight.data = (merged.T if isinstance(module, Conv1D) else merged).to(weight.dtype)

    def _weight(self) -> Tensor:
        weight = dense_weight(self._host[0])
        assert weight is not None, "on_attach has seen it"
        # in one go: where the weight lies transposed, a sum of both would walk across one of them
        return torch.addmm(weight, self.lora.lora_B, self.lora.lora_A, alpha=self.lora.scale)


class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation (Liu et al. 2024); the fields are LoRA's."""

    name: Literal["dora"] = "dora"  # type: ignore[assignment]

    @model_validator(mode="after")
    def _plain_start(self) -> Self:
        if self.init_lora_weights in ("pissa", "olora"):
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} is LoRA's: DoRA starts at the base's norms")
        return self

    label: ClassVar[str] = "DoRA"
    best_for: ClassVar[str] = "LoRA's place where rank is small and training time is no matter"

    named_by_weight: ClassVar[bool] = False

    @model_validator(mode="after")
    def _linears_only(self) -> Self:
        if self.target_parameters:
            raise ValueError(
                "DoRA does not act on target_parameters: the norm of every expert's rows would be taken in each step, "
                "and PEFT has no such layer. Use LoRA (name: lora) for experts"
            )
        return self

    def build(self, site: Site) -> DoRALayer:
        lora = super().build(site)
        assert isinstance(lora, LoRALayer)
        return DoRALayer(lora, overwritten=isinstance(site, OutputSite) and site.overwritten)

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        for _, module in modules:
            assert isinstance(module, DoRALayer)
            module.lora.initialise(context.generator)
            module.magnitude.copy_(module.row_norms())

    # PEFT's layout: LoRA's with use_dora, and <module>.lora_magnitude_vector [out]

    def to_folder(self, state: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        plain = {name.replace(".lora.lora_", ".lora_"): tensor for name, tensor in state.items()}
        config, tensors = super().to_folder(plain, family)
        renamed = {name.replace(".magnitude.weight", _MAGNITUDE): tensor for name, tensor in tensors.items()}
        return {**config, "use_dora": True}, renamed

    def from_folder(self, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        found = {}
        for name, tensor in super().from_folder(tensors, family).items():
            for theirs, ours in ((_MAGNITUDE, ".magnitude"), (".lora_A", ".lora.lora_A"), (".lora_B", ".lora.lora_B")):
                if name.endswith(theirs):
                    name = name.removesuffix(theirs) + ours
            found[name] = tensor
        return found

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any]) -> LoRA | None:
        return cls(**peft_fields(config)) if config.get("peft_type") == "LORA" and config.get("use_dora") else None
