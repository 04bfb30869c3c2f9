"""Attention that is not causal: prefixes and prompts leave what the base sees as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
)

from spectune.compute.varlen import loop_by_document
from spectune.deltas import Method, attach, packed, packing, route, why_not_packed
from spectune.errors import ConfigError
from spectune.methods import LoRA, PrefixTuning, PromptTuning
from tests.contract.conftest import move, tokens
from tests.contract.families import SIZES, gpt2, llama
from tests.support.pictures import PICTURES, text_with_picture, with_types

ENCODER: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def llama_of_an_embedder() -> PreTrainedModel:
    model = llama()
    model.config.is_causal = False
    return model


def gpt2_of_an_embedder() -> PreTrainedModel:
    model = gpt2()
    model.config.is_causal = False
    return model


def gemma3_both_ways() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6, layer_types=kinds, use_bidirectional_attention=True)
    )


def bert() -> PreTrainedModel:
    return BertLMHeadModel(BertConfig(**ENCODER))


def roberta() -> PreTrainedModel:
    return RobertaForCausalLM(RobertaConfig(**ENCODER, pad_token_id=1))


NOT_CAUSAL = [llama_of_an_embedder, gpt2_of_an_embedder, gemma3_both_ways, bert, roberta]
ROWS = torch.randint(2, 97, (2, 7), generator=torch.Generator().manual_seed(1))
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


def made(make: Callable[[], PreTrainedModel], attention: str) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("make", NOT_CAUSAL)
def test_eager_and_sdpa_agree_with_a_prefix(make: Callable[[], PreTrainedModel], mask: Tensor | None) -> None:
    found = []
    for attention in ("eager", "sdpa"):
        model = made(make, attention)
        with torch.no_grad():
            bare = model(input_ids=ROWS, attention_mask=mask).logits
            move(attach(model, PrefixTuning(num_virtual_tokens=3), "one"), 0.3)
            move(attach(model, PrefixTuning(num_virtual_tokens=5), "two"), 0.3)
            answers = {}
            for names in ("one", ["one", None], ["two", "one"]):
                with route(model, names):
                    answers[str(names)] = model(input_ids=ROWS, attention_mask=mask).logits
        # rows of a mixed batch are what they are alone, the bare base's among them
        real = slice(None) if mask is None else slice(2, None)
        assert torch.allclose(answers["['one', None]"][0, real], answers["one"][0, real], atol=1e-5)
        assert torch.allclose(answers["['two', 'one']"][1], answers["one"][1], atol=1e-5)
        assert torch.allclose(answers["['one', None]"][1], bare[1], atol=1e-5)
        found.append(torch.stack([answers["one"], answers["['one', None]"], answers["['two', 'one']"]])[:, :, real])
    assert torch.allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_first_token_sees_the_last_one_through_a_prefix_where_attention_is_not_causal(attention: str) -> None:
    """The one change that a causal mask would hide."""
    other = ROWS.clone()
    other[:, -1] = (other[:, -1] + 1) % 90 + 2
    for make, given in ((llama_of_an_embedder, {}), (llama, {"is_causal": False}), (bert, {})):
        model = made(make, attention)
        move(attach(model, PrefixTuning(num_virtual_tokens=3), "one"), 0.3)
        with torch.no_grad():
            first, second = (model(input_ids=ids, **given).logits[:, 0] for ids in (ROWS, other))
        assert float((first - second).abs().max()) > 1e-4


def test_a_layer_that_is_set_not_to_be_causal_sees_through_a_prefix_what_it_sees_without() -> None:
    """SDPA without a mask asks the module; eager attention has the mask of the model."""
    for attention, looks_ahead in (("sdpa", True), ("eager", False)):
        model = made(llama, attention)
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
        other = ROWS.clone()
        other[:, -1] = 3
        move(attach(model, PrefixTuning(num_virtual_tokens=3), "one"), 0.3)
        for names in (None, "one", ["one", None]):
            with route(model, names), torch.no_grad():
                first, second = (model(input_ids=ids).logits[:, 0] for ids in (ROWS, other))
            assert bool((first - second).abs().amax(-1).min() > 1e-5) is looks_ahead, (attention, names)


@pytest.mark.parametrize("kernel", [None, loop_by_document])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("method", [LoRA(r=2), PrefixTuning(num_virtual_tokens=3), PromptTuning(num_virtual_tokens=3)],
                         ids=lambda method: str(method.name))  # fmt: skip
def test_documents_of_a_pack_are_seen_whole_where_attention_is_not_causal(
    method: Method, attention: str, kernel: Any
) -> None:
    model = made(llama_of_an_embedder, attention)
    move(attach(model, method, "task"), 0.3)
    assert why_not_packed(model, kernel) is None
    first, second = tokens(1, 5, seed=1), tokens(1, 4, seed=2)
    documents = torch.tensor([[0] * 5 + [1] * 4])
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=ids).logits for ids in (first, second)], dim=1)
        with packing(model, kernel), packed(model, documents):
            together = model(
                input_ids=torch.cat([first, second], dim=1), position_ids=positions, use_cache=False
            ).logits
    assert torch.allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize("method", [PrefixTuning(num_virtual_tokens=3), PromptTuning(num_virtual_tokens=3)],
                         ids=lambda method: str(method.name))  # fmt: skip
@pytest.mark.parametrize("name", PICTURES)
def test_eager_and_sdpa_agree_on_a_picture(name: str, method: Method) -> None:
    found = []
    for attention in ("eager", "sdpa"):
        model = made(PICTURES[name], attention)
        move(attach(model, method, "task"), 0.3)
        with torch.no_grad():
            found.append(model(**with_types(name, text_with_picture())).logits)
    assert torch.allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", PICTURES)
def test_a_prompt_before_a_picture_is_as_tokens_of_its_embeddings(name: str, attention: str) -> None:
    """What stands before the text is seen by all of it, whoever makes the mask: the base itself is the judge."""
    model = made(PICTURES[name], attention)
    before = (8, 9, 10)
    # PaliGemma's token types would let the tokens before see the picture, which virtual tokens do not
    call = text_with_picture if name == "paligemma" else lambda *given: with_types(name, text_with_picture(*given))
    with torch.no_grad():
        expected = model(**call(before)).logits[:, len(before) :]
        put_in_front(model, before)
        for padding in (0,) if name == "paligemma" else (0, 4):
            got = model(**call((), padding)).logits[:, padding:]
            assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", PICTURES)
def test_padding_before_a_prompt_and_a_picture_changes_nothing(name: str, attention: str) -> None:
    model = made(PICTURES[name], attention)
    put_in_front(model, (8, 9, 10))
    attach(model, LoRA(r=2), "other")
    call, padded = (with_types(name, text_with_picture((), padding)) for padding in (0, 4))
    both = {key: torch.cat([value, value]) for key, value in padded.items()}
    with torch.no_grad():
        with route(model, "task"):
            expected = model(**call).logits
            assert torch.allclose(model(**padded).logits[:, 4:], expected, atol=1e-5)
        with route(model, None):
            bare = model(**padded).logits
        if name == "paligemma":  # which is causal where there is padding, and not where there is none
            return
        with route(model, ["task", None]):  # prompts of unlike lengths
            mixed = model(**both).logits[:, 4:]
    assert torch.allclose(mixed[:1], expected, atol=1e-5)
    assert torch.allclose(mixed[1:], bare[:, 4:], atol=1e-5)


@pytest.mark.parametrize("name", PICTURES)
def test_a_text_goes_on_behind_a_prompt_and_a_picture(name: str) -> None:
    """Token by token over a cache, and in one pass."""
    model = made(PICTURES[name], "sdpa")
    put_in_front(model, (8, 9, 10))
    call = with_types(name, text_with_picture())
    made_of_it = model.generate(**call, max_new_tokens=4, do_sample=False, output_logits=True,
                                return_dict_in_generate=True)  # fmt: skip
    for number, logits in enumerate(made_of_it.logits):
        ids = made_of_it.sequences[:, : call["input_ids"].shape[1] + number]
        whole = {**call, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_type_ids" in call:  # what is made is the answer
            added = torch.full((1, number), int(name == "paligemma"))
            whole["token_type_ids"] = torch.cat([call["token_type_ids"], added], dim=1)
        with torch.no_grad():
            assert torch.allclose(logits, model(**whole).logits[:, -1], atol=1e-4)


def test_a_mask_of_a_kind_that_has_no_room_for_a_prompt_is_refused_by_name() -> None:
    model = made(PICTURES["gemma3"], "eager")
    put_in_front(model, (8, 9, 10))
    call = with_types("gemma3", text_with_picture())
    mask = torch.zeros(1, 1, 9, 9)
    with pytest.raises(ConfigError, match=r"a ready-made one .* has no place for the virtual tokens"):
        model(**{**call, "attention_mask": mask})
    decoder = model.model.language_model
    embeds = torch.zeros(1, 9, 32)
    kinds = {"full_attention": mask, "chunked_attention": mask}
    model.model.forward = lambda **_: decoder(inputs_embeds=embeds, attention_mask=kinds)
    with pytest.raises(ConfigError, match=r"makes masks of the kind chunked_attention.*Use prefix tuning or LoRA"):
        model(**call)


def put_in_front(model: Any, tokens: tuple[int, ...]) -> None:
    """A prompt of the embeddings of these tokens."""
    delta = attach(model, PromptTuning(num_virtual_tokens=len(tokens)), "task")
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(model.get_input_embeddings()(torch.tensor(tokens)))
