"""A prefix before unmasked causal text: what SDPA is asked for, and that it is what a dense mask gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spectune.blocks.compile import compiled
from spectune.blocks.recompute import recomputing
from spectune.deltas import attach, route
from spectune.deltas.hooks import prefix_kernel
from spectune.methods import LoRA, PrefixTuning

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
P, T = 3, 8
IDS = torch.randint(1, 97, (2, T), generator=torch.Generator().manual_seed(1))
#: queries, keys, whether a mask came, whether attention was told to be causal
PLAIN, ONE_TOKEN, MASKED = (P + T, P + T, False, True), (1, P + T + 1, False, False), (T, P + T, True, False)


class Watched:
    """What SDPA is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, bool, bool]] = []
        self.real = F.scaled_dot_product_attention

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **named: Any
    ) -> Tensor:
        self.calls.append((query.shape[2], key.shape[2], attn_mask is not None, named.get("is_causal", False)))
        found: Tensor = self.real(query, key, value, attn_mask, **named)
        return found


@pytest.fixture
def sdpa(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    watched = Watched()
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    yield watched
    assert watched.calls


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def mistral(window: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).eval()


def gradients(model: PreTrainedModel, **inputs: Any) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    model(input_ids=IDS, use_cache=False, **inputs).logits.pow(2).mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


class Host(nn.Module):
    """What transformers' function asks of an attention module."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([(4, 4), (4, 2), (4, 1)]), st.sampled_from([None, 0.3]))
def test_it_is_a_softmax_over_the_prefix_and_the_text_so_far(
    text: int, count: int, heads: tuple[int, int], scale: float | None
) -> None:
    """Output and all gradients, in float64."""
    many, few = heads
    generator = torch.Generator().manual_seed(text * 10 + count)
    shapes = [(2, many, text, 8), (2, few, text, 8), (2, few, text, 8), (few, count, 8), (few, count, 8)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    query, key, value, *prefix = tensors
    weights = torch.randn(2, text, many, 8, generator=generator, dtype=torch.float64)

    found, _ = prefix_kernel.attend(
        sdpa_attention_forward, Host(many // few), query, key, value, (prefix[0], prefix[1]), {"scaling": scale}
    )
    keys, values = (
        torch.cat([lead.expand(2, -1, -1, -1), own], 2).repeat_interleave(many // few, 1)
        for lead, own in zip(prefix, (key, value), strict=True)
    )
    scores = query @ keys.transpose(2, 3) * (8**-0.5 if scale is None else scale)
    later = torch.arange(count + text) > torch.arange(text)[:, None] + count
    wanted = (scores.masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(1, 2)

    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), tensors) for out in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("mask", [None, torch.ones_like(IDS)], ids=["no mask", "a mask of ones"])
def test_where_nothing_is_hidden_there_is_no_mask(sdpa: Watched, mask: Tensor | None) -> None:
    model = llama()
    attach(model, PrefixTuning(num_virtual_tokens=P), "task")
    sdpa.calls.clear()
    plain = gradients(model, attention_mask=mask)
    assert set(sdpa.calls) == {PLAIN}
    model.set_attn_implementation("eager")
    for a, b in zip(plain, gradients(model), strict=True):
        torch.testing.assert_close(a, b)


def test_padding_is_hidden_by_a_mask(sdpa: Watched) -> None:
    model = llama()
    attach(model, PrefixTuning(num_virtual_tokens=P), "task")
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    sdpa.calls.clear()
    model(input_ids=IDS, attention_mask=mask, use_cache=False)
    assert set(sdpa.calls) == {MASKED}


def test_rows_with_different_prefixes_have_a_mask_and_rows_with_one_do_not(sdpa: Watched) -> None:
    model = llama()
    attach(model, PrefixTuning(num_virtual_tokens=P), "long")
    attach(model, PrefixTuning(num_virtual_tokens=1), "short")
    with torch.no_grad():
        alone = {}
        for name in ("long", "short"):
            sdpa.calls.clear()
            with route(model, [name, name]):
                alone[name] = model(input_ids=IDS, use_cache=False).logits
            assert [call[2:] for call in sdpa.calls] == [(False, True)] * 2
        sdpa.calls.clear()
        with route(model, ["long", "short"]):
            mixed = model(input_ids=IDS, use_cache=False).logits
    assert set(sdpa.calls) == {MASKED}
    torch.testing.assert_close(mixed[0], alone["long"][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], alone["short"][1], atol=1e-5, rtol=1e-5)


def test_beside_a_prefix_others_have_the_attention_that_they_have_alone(sdpa: Watched) -> None:
    model = llama()
    wanted = model(input_ids=IDS).logits
    attach(model, LoRA(r=2), "lora")
    attach(model, PrefixTuning(num_virtual_tokens=P), "task")
    for name in (None, "lora"):
        sdpa.calls.clear()
        with route(model, name):
            assert torch.equal(model(input_ids=IDS).logits, wanted)
        assert set(sdpa.calls) == {(T, T, False, True)}


def test_a_new_token_needs_no_mask(sdpa: Watched) -> None:
    model = llama()
    attach(model, PrefixTuning(num_virtual_tokens=P), "task")
    more = torch.tensor([[5], [6]])
    with torch.no_grad():
        whole = model(input_ids=torch.cat([IDS, more], 1), use_cache=False).logits[:, -1]
        first = model(input_ids=IDS, use_cache=True)
        sdpa.calls.clear()
        step = model(input_ids=more, past_key_values=first.past_key_values).logits[:, -1]
    assert set(sdpa.calls) == {ONE_TOKEN}
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)


def test_places_of_a_static_cache_that_are_not_filled_yet_are_cut_off(sdpa: Watched) -> None:
    model = llama()
    attach(model, PrefixTuning(num_virtual_tokens=P), "task")
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
        sdpa.calls.clear()
        cache = StaticCache(config=model.config, max_cache_len=20)
        found = model(input_ids=IDS, past_key_values=cache).logits
    assert set(sdpa.calls) == {PLAIN}
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("window", "sliding", "call"),
    [(T + 1, False, PLAIN), (4, False, MASKED), (T + 1, True, MASKED), (4, True, MASKED)],
    ids=["wide", "narrow", "wide and moving", "narrow and moving"],
)
def test_windows(sdpa: Watched, window: int, sliding: bool, call: tuple[int, int, bool, bool]) -> None:
    """A window wider than the text hides nothing of it; one that moves past the prefix may hide some of that."""
    model = mistral(window)
    attach(model, PrefixTuning(num_virtual_tokens=P, sliding=sliding), "task")
    sdpa.calls.clear()
    found = gradients(model)
    assert set(sdpa.calls) == {call}
    model.set_attn_implementation("eager")
    for a, b in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["selective", True])
def test_recomputed_it_is_the_same(sdpa: Watched, mode: Any) -> None:
    model = llama()
    attach(model, PrefixTuning(num_virtual_tokens=P), "task")
    model.train()
    wanted = gradients(model)
    sdpa.calls.clear()
    with recomputing(model, mode):
        found = gradients(model)
    assert set(sdpa.calls) == {PLAIN}
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_it_is_one_graph_without_a_mask() -> None:
    model = llama()
    delta = attach(model, PrefixTuning(num_virtual_tokens=P), "task")
    model.train()
    wanted = gradients(model)
    graphs: list[list[Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append([n for n in graph.graph.nodes if "scaled_dot_product_attention" in str(n.target)])
        return graph.forward

    torch._dynamo.reset()
    with compiled(model, delta.family, backend=backend):
        found = gradients(model)
    # the first block's input needs no gradient: two graphs, each with the whole block's attention
    assert [len(nodes) for nodes in graphs] == [1] * len(graphs)
    assert 1 <= len(graphs) <= 2
    for [node] in graphs:
        assert node.kwargs["attn_mask"] is None
        assert node.kwargs["is_causal"] is True
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
