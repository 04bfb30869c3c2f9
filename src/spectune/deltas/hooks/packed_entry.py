"""The decoder's entry for a packed batch: virtual tokens go before each of its documents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spectune.compute.pack_layout import Pack
from spectune.errors import ConfigError


def check_packed_call(call: dict[str, Any], pack: Pack, text: Tensor) -> None:
    """Raise ConfigError where a decoder's call is none of this packed batch. `text`: its ids or embeddings."""
    if text.shape[:2] != pack.documents.shape:
        raise ConfigError(
            f"the batch is {list(text.shape[:2])}, `documents` are {list(pack.documents.shape)}: expected both to "
            "be [packs, length]"
        )
    if call.get("attention_mask") is not None:
        raise ConfigError("a packed batch has no attention mask: `documents` say what is padding")


def check_packed_context(pack: Pack, virtual: int, context: int | None) -> None:
    """Raise ConfigError where the longest document and its virtual tokens need more positions than the base has."""
    if context is not None and virtual and pack.longest + virtual > context:
        raise ConfigError(
            f"a document of {pack.longest} tokens and {virtual} virtual ones need {pack.longest + virtual} positions; "
            f"this base has {context}. Use at most {context - virtual} text tokens, or fewer virtual ones."
        )


def put_before_documents(call: dict[str, Any], pack: Pack, prompt: Tensor, embedding: nn.Module) -> tuple[Pack, Tensor]:
    """Put virtual tokens before each document of a decoder's call, in place.

    Args:
        call: by argument name.
        prompt: embeddings `[virtual tokens, hidden]`.
        embedding: of the text's tokens.

    Returns:
        the longer pack, and where each place of the text stands in it, `[packs, length]` int64.
    """
    if call.get("token_type_ids") is not None:
        raise ConfigError("token_type_ids do not go with prompt tuning: virtual tokens have no type. Leave them out.")
    pack, source, moved = pack.grown(prompt.shape[0])
    embeds = call.get("inputs_embeds")
    if embeds is None:
        embeds = embedding(call["input_ids"])
    prompt = prompt.to(dtype=embeds.dtype, device=embeds.device)
    row = torch.arange(embeds.shape[0], device=embeds.device)[:, None]
    text, virtual = embeds[row, source.clamp(min=0)], prompt[(-1 - source).clamp(min=0)]
    call["input_ids"] = None
    call["inputs_embeds"] = torch.where((source < 0)[..., None], virtual, text)
    return pack, moved
