"""Positions that a caller gives: virtual tokens stand before the text, wherever it says that it begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, RobertaConfig, RobertaForCausalLM

from spectune.deltas import attach, detach, route
from spectune.errors import ConfigError
from spectune.methods import LoRA, PrefixTuning, PromptTuning
from tests.contract.conftest import move, tokens
from tests.contract.families import SIZES, gemma3, gpt2, llama, opt

BEFORE = torch.tensor([8, 9, 10])
IDS = tokens(2, 7)
HOW: dict[str, Tensor] = {
    "from 0": torch.arange(7)[None],
    "from 1": torch.arange(1, 8)[None],
    "far off": torch.arange(20, 27).expand(2, -1),
    "each row its own": torch.stack([torch.arange(7), torch.arange(3, 10)]),
}


def with_prompt(model: Any) -> None:
    """A prompt of the embeddings of `BEFORE`."""
    delta = attach(model, PromptTuning(num_virtual_tokens=len(BEFORE)), "task")
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(model.get_input_embeddings()(BEFORE))


def made(make: Any, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation(attention)
    return model


def in_front(positions: Tensor) -> dict[str, Tensor]:
    """The call of the base with `BEFORE` as tokens: what a prompt of their embeddings has to be the same as."""
    count = len(BEFORE)
    lead = torch.arange(count).expand(*positions.shape[:-1], -1)
    ids = torch.cat([BEFORE.expand(2, -1), IDS], dim=1)
    places = torch.cat([lead, positions + count], dim=-1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [llama, gpt2, gemma3, opt])
def test_a_prompt_acts_wherever_positions_begin(make: Any, attention: str, use_cache: bool) -> None:
    model = made(make, attention)
    with torch.no_grad():
        expected = {how: model(**in_front(places)).logits[:, len(BEFORE) :] for how, places in HOW.items()}
        with_prompt(model)
        for how, places in HOW.items():
            got = model(input_ids=IDS, position_ids=places, use_cache=use_cache).logits
            assert torch.allclose(got, expected[how], atol=1e-5), how


def test_positions_of_three_axes_go_with_a_prompt() -> None:
    """Multimodal rotary positions: time, height and width, and before them, where there are four, the tokens'."""
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8}
    model = made(lambda: Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)))
    apart = torch.arange(1, 8) + torch.tensor([0, 2, 4])[:, None, None]
    cases = [apart.expand(3, 2, -1), torch.cat([torch.arange(1, 8).expand(1, 1, -1), apart]).expand(4, 2, -1)]
    with torch.no_grad():
        expected = [model(**in_front(places)).logits[:, len(BEFORE) :] for places in cases]
        with_prompt(model)
        for places, wanted in zip(cases, expected, strict=True):
            got = model(input_ids=IDS, position_ids=places, use_cache=False).logits
            assert torch.allclose(got, wanted, atol=1e-5)
        four = torch.cat([torch.tensor([0, 1, 2, 0, 1, 2, 3]).expand(1, 2, -1), cases[0]])
        with pytest.raises(ConfigError, match="do not rise one by one"):
            model(input_ids=IDS, position_ids=four, use_cache=False)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_documents_in_one_row_are_refused_with_a_prompt_and_nothing_is_left_of_it(make: Any) -> None:
    model = made(make)
    bare = model(input_ids=IDS).logits
    with_prompt(model)
    right = model(input_ids=IDS).logits
    for row in ([0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 5, 6, 7, 8]):
        places = torch.tensor([list(range(7)), row])
        with pytest.raises(ConfigError, match=rf"position_ids of row 1 .*{row[:4]}".replace("[", r"\[").rstrip("]")):
            model(input_ids=IDS, position_ids=places, use_cache=False)
    assert torch.equal(model(input_ids=IDS).logits, right)
    detach(model, "task")
    assert torch.equal(model(input_ids=IDS).logits, bare)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_document_in_one_row_sees_the_whole_prefix_and_no_other_document(attention: str) -> None:
    model = made(llama, attention)
    move(attach(model, PrefixTuning(num_virtual_tokens=3), "task"), 0.3)
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with torch.no_grad():
        alone = torch.cat([model(input_ids=part).logits for part in (IDS[:, :3], IDS[:, 3:])], dim=1)
        together = model(input_ids=IDS, position_ids=places.expand(2, -1), use_cache=False).logits
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("pad", [0, 1])
def test_positions_begin_where_the_base_itself_begins(pad: int) -> None:
    """RoBERTa's begin behind the row of padding."""
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size")}
    config = RobertaConfig(**sizes, num_hidden_layers=2, max_position_embeddings=64, pad_token_id=pad, is_decoder=True)
    model = made(lambda: RobertaForCausalLM(config))
    ids = IDS.clamp(min=2)
    padded = torch.cat([torch.full((2, 2), pad), ids], dim=1)
    mask = (padded != pad).long()
    with torch.no_grad():
        bare = model(input_ids=ids).logits
        whole = torch.cat([BEFORE.expand(2, -1), ids], dim=1)
        expected = model(input_ids=whole).logits[:, len(BEFORE) :]
        with_prompt(model)
        attach(model, LoRA(r=2), "other")
        for given, cut in (({"input_ids": ids}, 0), ({"input_ids": padded, "attention_mask": mask}, 2)):
            with route(model, "task"):
                assert torch.allclose(model(**given).logits[:, cut:], expected, atol=1e-5)
            with route(model, ["task", None]):
                mixed = model(**given).logits[:, cut:]
            assert torch.allclose(mixed[0], expected[0], atol=1e-5)
            assert torch.allclose(mixed[1], bare[1], atol=1e-5)
