"""Prompt tuning: train the embeddings of a few virtual tokens before the text.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691: the input becomes
`[P_e; X_e]`, and only `P_e` `[virtual tokens, hidden]` is trained. Starts: embeddings of common words of the
vocabulary (the paper's "sampled vocabulary"), of a given text, or uniform noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.deltas import (
    SWEEPS,
    DeltaModule,
    InitContext,
    InputModule,
    InputSite,
    Method,
    RatePoint,
    RateRule,
    Site,
    prove_reads_embeddings,
)  # fmt: skip
from spectune.errors import ConfigError
from spectune.families import Family, token_embedding


class VirtualTokens(InputModule):
    """The embeddings `[virtual tokens, hidden]`."""

    def __init__(self, count: int, hidden: int) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(torch.zeros(count, hidden))

    def forward(self) -> Tensor:
        return self.prompt_embeddings


class PromptTuning(Method):
    """Trained embeddings before the text (Lester et al. 2021).

    Attributes:
        num_virtual_tokens: how many.
        init: "vocab" (common words' embeddings), "text" (those of `init_text`, repeated or cut to length), "random".
        init_text: the text for `init="text"`; attach then needs the tokenizer.
    """

    name: Literal["prompt"] = "prompt"
    num_virtual_tokens: int = Field(20, ge=1)
    init: Literal["vocab", "text", "random"] = "vocab"
    init_text: str | None = None

    label: ClassVar[str] = "Prompt tuning"
    best_for: ClassVar[str] = "very large bases and very many tasks; weakest on small bases"
    learning_rates: ClassVar[RateRule] = RateRule((
        RatePoint(224, 0.025, SWEEPS),
        RatePoint(448, 0.12, SWEEPS),
        RatePoint(640, 0.04, SWEEPS),
        RatePoint(896, 0.025, SWEEPS),
        RatePoint(4096, 0.02, "TRL's examples (1e-2 to 3e-2)", strong=False),
    ))  # fmt: skip
    starts_at_identity: ClassVar[bool] = False

    @model_validator(mode="after")
    def _text_where_needed(self) -> PromptTuning:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init='text' and init_text go together: give both or neither")
        return self

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def sites(self, family: Family) -> list[Site]:
        return [InputSite(family.decoder, family.hidden_size)]

    def build(self, site: Site) -> VirtualTokens:
        assert isinstance(site, InputSite)
        return VirtualTokens(self.num_virtual_tokens, site.hidden_size)

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        module = modules[0][1]
        assert isinstance(module, VirtualTokens)
        shape = module.prompt_embeddings.shape
        embeddings = token_embedding(context.model)
        if self.init == "random":  # U(-0.5, 0.5) as in the paper, which is for embeddings of size about 1
            spread = float(embeddings.weight.float().std()) * 3**0.5
            module.prompt_embeddings.copy_(torch.empty(shape).uniform_(-spread, spread, generator=context.generator))
            return
        ids = self._text_ids(context) if self.init == "text" else context.common_tokens(shape[0])
        table = torch.tensor(ids, device=embeddings.weight.device)
        module.prompt_embeddings.copy_(embeddings(table).float())

    def prove(self, model: PreTrainedModel, family: Family) -> None:
        """The decoder must read embeddings, and nothing but them."""
        prove_reads_embeddings(model)

    def _text_ids(self, context: InitContext) -> list[int]:
        if context.tokenizer is None:
            raise ConfigError(
                "PromptTuning(init='text') needs the tokenizer: attach(model, method, tokenizer=tokenizer)"
            )
        ids = list(context.tokenizer(self.init_text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ConfigError(f"init_text {self.init_text!r} has no tokens")
        return (ids * -(-self.num_virtual_tokens // len(ids)))[: self.num_virtual_tokens]

    # PEFT's layout: one tensor prompt_embeddings [virtual tokens, hidden]

    def to_folder(self, state: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": family.hidden_size,
            "num_transformer_submodules": 1,
            "num_attention_heads": family.attentions[0].kv_heads if family.attentions else 1,
            "num_layers": len(family.layers),
            "prompt_tuning_init": "RANDOM",
        }
        return config, {"prompt_embeddings": next(iter(state.values()))}

    def from_folder(self, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        path = f"{family.decoder}.prompt_embeddings"
        return {path if name == "prompt_embeddings" else name: tensor for name, tensor in tensors.items()}

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any]) -> PromptTuning | None:
        ours = config.get("peft_type") == "PROMPT_TUNING"
        return cls(num_virtual_tokens=config["num_virtual_tokens"], init="random") if ours else None

    def as_stored(self) -> PromptTuning:
        return self.model_copy(update={"init": "random", "init_text": None})
