"""Prefix tuning: train keys and values that every layer's attention sees before the text's own.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190: each layer attends
over `[P_K; K]`, `[P_V; V]`. With `prefix_projection` the prefix is `P = MLP(P')` while training (their equation 3,
embedding -> linear -> tanh -> linear), and only its result is stored. Without it (P-tuning v2's flat form, Liu et al.
2022, arXiv 2110.07602) training starts from the keys and values that the base itself makes of common words: section
7.4 of the paper found activations of real words a far better start than noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from spectune.deltas import (
    SWEEPS,
    AttentionModule,
    AttentionSite,
    DeltaModule,
    InitContext,
    Method,
    RatePoint,
    RateRule,
    Site,
    capture_keys_and_values,
)  # fmt: skip
from spectune.errors import ConfigError, DataError
from spectune.families import Attention, Family


class KeysValues(AttentionModule):
    """One layer's prefix, flat: keys and values `[kv_heads, virtual tokens, dim]`."""

    def __init__(self, count: int, attention: Attention, slides: bool) -> None:
        super().__init__()
        self.slides = slides
        self.key = nn.Parameter(torch.zeros(attention.kv_heads, count, attention.key_dim))
        self.value = nn.Parameter(torch.zeros(attention.kv_heads, count, attention.value_dim))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value


class Trunk(DeltaModule):
    """What all layers share of the reparametrisation: `tanh(linear(P'))`, `[virtual tokens, encoder_hidden_size]`."""

    def __init__(self, count: int, hidden: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(count, hidden))
        self.linear = nn.Linear(hidden, width)

    def forward(self) -> Tensor:
        return torch.tanh(self.linear(self.embedding))


class ProjectedKeysValues(AttentionModule):
    """One layer's prefix while it is reparametrised: its slice of the MLP's last linear."""

    def __init__(self, width: int, attention: Attention, slides: bool) -> None:
        super().__init__()
        self.slides = slides
        self.attention = attention
        self.out = nn.Linear(width, attention.kv_heads * (attention.key_dim + attention.value_dim))

    def bind_shared(self, shared: nn.Module) -> None:
        self._trunk = [shared]  # in a list: it is the decoder's child, not this module's

    def forward(self) -> tuple[Tensor, Tensor]:
        flat = self.out(self._trunk[0]())
        a = self.attention
        key, value = torch.split(flat, [a.kv_heads * a.key_dim, a.kv_heads * a.value_dim], dim=-1)
        return _heads_first(key, a.kv_heads), _heads_first(value, a.kv_heads)

    def stored(self) -> dict[str, Tensor]:
        with torch.no_grad():
            key, value = self()
        return {"key": key, "value": value}


class PrefixTuning(Method):
    """Trained keys and values in every layer (Li and Liang 2021).

    Attributes:
        num_virtual_tokens: length of the prefix.
        prefix_projection: train through an MLP that is folded away when stored.
        encoder_hidden_size: width of that MLP.
        sliding: on bases with sliding windows, let the windows move past the prefix, as PEFT does; otherwise every
            position sees it. PEFT's folders load with it.
    """

    name: Literal["prefix"] = "prefix"
    num_virtual_tokens: int = Field(20, ge=1)
    prefix_projection: bool = False
    encoder_hidden_size: int = Field(512, ge=1)
    sliding: bool = False

    label: ClassVar[str] = "Prefix tuning"
    best_for: ClassVar[str] = "generation tasks on a frozen base, many users in one batch"
    learning_rates: ClassVar[RateRule] = RateRule((
        RatePoint(224, 0.2, SWEEPS),
        RatePoint(448, 0.2, SWEEPS),
        RatePoint(640, 0.3, SWEEPS),
        RatePoint(896, 0.45, SWEEPS),
        RatePoint(4096, 1e-2, "T-Few's and LLM-Adapters' settings (1e-2 and 3e-2)", strong=False),
    ))  # fmt: skip
    starts_at_identity: ClassVar[bool] = False

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def sites(self, family: Family) -> list[Site]:
        if not family.attentions:
            raise ConfigError(f"prefix tuning is refused: no attention was found in this {family.model_type} model")
        return [AttentionSite(attention.path, attention) for attention in family.attentions]

    def build(self, site: Site) -> AttentionModule:
        assert isinstance(site, AttentionSite)
        if self.prefix_projection:
            return ProjectedKeysValues(self.encoder_hidden_size, site.attention, self.sliding)
        return KeysValues(self.num_virtual_tokens, site.attention, self.sliding)

    def build_shared(self, family: Family) -> nn.Module | None:
        if not self.prefix_projection:
            return None
        return Trunk(self.num_virtual_tokens, family.hidden_size, self.encoder_hidden_size)

    def notice(self, family: Family) -> str | None:
        if not (without := sum(not layer.attentions for layer in family.layers)):
            return None
        return (
            f"{without} of {len(family.layers)} layers of this {family.model_type} model have no attention: the prefix "
            "acts in the others"
        )

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        if self.prefix_projection:
            trunk = context.shared
            assert isinstance(trunk, Trunk)
            for parameter in nn.ModuleList([trunk, *(module for _, module in modules)]).parameters():
                bound = 1 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.0
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=context.generator))
            trunk.embedding.copy_(torch.empty(trunk.embedding.shape).normal_(generator=context.generator))
            return
        paths = [site.path for site, _ in modules]
        ids = context.common_tokens(self.num_virtual_tokens)
        found = capture_keys_and_values(context.model, paths, ids)
        for site, module in modules:
            assert isinstance(module, KeysValues)
            if site.path in found:  # a module that attention never reaches is refused by name right after
                key, value = found[site.path]
                if key.shape != module.key.shape or value.shape != module.value.shape:
                    raise ConfigError(
                        f"{site.path}: attention uses keys {list(key.shape)} and values {list(value.shape)} [heads, "
                        f"tokens, dim], its config says {list(module.key.shape)} and {list(module.value.shape)}; "
                        "prefix tuning is refused"
                    )
                module.key.copy_(key)
                module.value.copy_(value)

    # PEFT's layout, where PEFT would read the same of it: one tensor [virtual tokens, layers * 2 * kv_heads * dim], per
    # layer keys then values

    def to_folder(self, state: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if family.sliding_window is not None and not self.sliding:
            return super().to_folder(state, family)  # PEFT's windows would move past it
        first = family.attentions[0]
        stored = [state[f"{a.path}.{part}"] for a in family.attentions for part in ("key", "value")]
        config = {
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": first.kv_heads * first.key_dim,
            "num_transformer_submodules": 1,
            "num_attention_heads": first.kv_heads,
            "num_layers": len(family.attentions),
            "encoder_hidden_size": self.encoder_hidden_size,
            "prefix_projection": self.prefix_projection,
        }
        return config, {"prompt_embeddings": torch.cat([tensor.transpose(0, 1).flatten(1) for tensor in stored], dim=1)}

    def from_folder(self, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        state = {name: tensor for name, tensor in tensors.items() if name != "prompt_embeddings"}
        if "prompt_embeddings" not in tensors:
            return state
        table = tensors["prompt_embeddings"]
        widths = [a.kv_heads * dim for a in family.attentions for dim in (a.key_dim, a.value_dim)]
        expected = [self.num_virtual_tokens, sum(widths)]
        if list(table.shape) != expected:
            raise DataError(f"prompt_embeddings is {list(table.shape)}, this base and config need {expected}")
        pieces = iter(torch.split(table, widths, dim=1))
        for a in family.attentions:
            state[f"{a.path}.key"] = _heads_first(next(pieces), a.kv_heads)
            state[f"{a.path}.value"] = _heads_first(next(pieces), a.kv_heads)
        return state

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any]) -> PrefixTuning | None:
        ours = config.get("peft_type") == "PREFIX_TUNING"  # what is stored is the projection's result
        return cls(num_virtual_tokens=config["num_virtual_tokens"], sliding=True) if ours else None

    def as_stored(self) -> PrefixTuning:
        return self.model_copy(update={"prefix_projection": False})


def _heads_first(flat: Tensor, heads: int) -> Tensor:
    """`[tokens, heads * dim]` -> `[heads, tokens, dim]`."""
    return flat.reshape(flat.shape[0], heads, -1).transpose(0, 1)
