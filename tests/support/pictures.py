"""Tiny models that take a picture beside the text, random weights, float32, and what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
)

from tests.contract.families import SIZES

#: four of them stand for a picture in the text
IMAGE_TOKEN = 90
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
           "image_size": 16, "patch_size": 8, "projection_dim": 32}  # fmt: skip


def gemma3() -> PreTrainedModel:
    """Image tokens see each other, in layers with a window of 6 and without; masks by kind of layer, made outside of
    the decoder."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = {**SIZES, "head_dim": 8, "sliding_window": 6, "layer_types": kinds}
    ids = {"image_token_id": IMAGE_TOKEN, "boi_token_id": 91, "eoi_token_id": 92}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=4, **ids)
    )


def paligemma() -> PreTrainedModel:
    """All that stands before the answer sees each other, if `token_type_ids` say what that is; one mask, made outside
    of the decoder."""
    text = {**SIZES, "model_type": "gemma", "head_dim": 8}
    vision = {**_VISION, "model_type": "siglip_vision_model"}
    sizes = {"image_token_id": IMAGE_TOKEN, "projection_dim": 32, "hidden_size": 32}
    return PaliGemmaForConditionalGeneration(PaliGemmaConfig(text_config=text, vision_config=vision, **sizes))


def llava() -> PreTrainedModel:
    """Causal throughout."""
    vision = {**_VISION, "model_type": "clip_vision_model"}
    config = LlavaConfig(
        text_config={**SIZES, "model_type": "llama"}, vision_config=vision, image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1, image_seq_length=4
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


PICTURES: dict[str, Callable[[], PreTrainedModel]] = {make.__name__: make for make in (gemma3, paligemma, llava)}


def text_with_picture(before: tuple[int, ...] = (), padding: int = 0) -> dict[str, Any]:
    """A call with one row: `padding` tokens of padding, the tokens `before`, then a text around a picture."""
    ids = torch.tensor([[*[0] * padding, *before, 1, 2, *[IMAGE_TOKEN] * 4, 5, 6, 7]])
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def with_types(name: str, call: dict[str, Any]) -> dict[str, Any]:
    """The call with token types, for the models that make masks of them: 1 is the picture (Gemma 3), or all that is
    not the answer is 0 (PaliGemma)."""
    ids: Tensor = call["input_ids"]
    types = {"gemma3": (ids == IMAGE_TOKEN).long(), "paligemma": ((ids == 6) | (ids == 7)).long()}
    return {**call, "token_type_ids": types[name]} if name in types else call
