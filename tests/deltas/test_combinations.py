"""Deltas on models whose modules are shared, tied or called twice, and in transformers' ways of generating."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectune.deltas import Method, attach, attached, detach, merge, route
from spectune.errors import ConfigError
from spectune.methods import BottleneckAdapter, DoRA, LoRA, PrefixTuning, PromptTuning
from spectune.storage import load_delta
from tests.contract.conftest import move, tokens
from tests.contract.families import gpt2, llama

METHODS: list[Method] = [
    LoRA(r=2), DoRA(r=2), PrefixTuning(num_virtual_tokens=2), PromptTuning(num_virtual_tokens=2),
    BottleneckAdapter(bottleneck_dim=4, dropout=0.0),
]  # fmt: skip
IDS = tokens(2, 6)


def named(method: Method) -> str:
    return method.name


def layer_in_two_places() -> Any:
    """As ALBERT has its layers."""
    model: Any = llama()
    model.model.layers[2] = model.model.layers[1]
    return model


def module_called_twice() -> Any:
    model: Any = llama()
    feed_forward = model.model.layers[1].mlp

    class Twice(type(feed_forward)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = super().forward(super().forward(x))
            return made

    feed_forward.__class__ = Twice
    return model


def linear_in_two_places() -> Any:
    model: Any = llama()
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    return model


def tied_linears() -> Any:
    model: Any = llama()
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    return model


SHARED = [layer_in_two_places, module_called_twice, linear_in_two_places, tied_linears]


def answer(model: Any, names: Any) -> Tensor:
    with torch.no_grad(), route(model, names):
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits  # layers in two places have one number
    return logits


@pytest.mark.parametrize("make", SHARED)
@pytest.mark.parametrize("method", METHODS, ids=named)
def test_shared_modules_are_one_place(method: Method, make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    delta = attach(model, method, "task")
    bare = answer(model, None)
    move(delta)
    tuned = answer(model, "task")
    assert not torch.equal(tuned, bare)
    mixed = answer(model, ["task", None])
    assert torch.allclose(mixed[0], tuned[0], atol=1e-5)
    assert torch.allclose(mixed[1], bare[1], atol=1e-5)
    model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    model.eval()
    if method.can_merge and make is tied_linears:
        with pytest.raises(ConfigError, match="are one tied weight"):
            merge(model, "task")
    elif method.can_merge:
        with torch.no_grad():
            assert torch.allclose(merge(model, "task")(input_ids=IDS, use_cache=False).logits, tuned, atol=1e-5)
    delta.save(tmp_path / "saved")
    detach(model, "task")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, bare)
    load_delta(model, tmp_path / "saved", "again")
    assert torch.equal(answer(model, "again"), tuned)


WAYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 2},
    "its own copy as assistant": lambda model: {"assistant_model": copy.deepcopy(model)},
    "another model as assistant": lambda model: {"assistant_model": type(model)(model.config).eval()},
    "no cache": lambda model: {"use_cache": False},
    "static cache": lambda model: {"cache_implementation": "static"},
    "text in pieces": lambda model: {"prefill_chunk_size": 2},
    "embeddings": lambda model: {"inputs_embeds": model.get_input_embeddings()(IDS[:1])},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_every_way_of_generating_goes_on_with_the_same_tokens(make: Callable[[], Any], way: str) -> None:
    torch.manual_seed(0)
    model: Any = make().eval()
    for method in METHODS:
        move(attach(model, method, method.name), 0.1)
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(IDS[:1]), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0,
        "eos_token_id": 96,
    }  # fmt: skip
    for name in attached(model):
        with route(model, name):
            greedy = model.generate(IDS[:1], **settings)[:, IDS.shape[1] :]
            more = WAYS[way](model)
            given = {} if "inputs_embeds" in more else {"input_ids": IDS[:1]}
            made = model.generate(**given, **settings, **more)
        assert torch.equal(made[:, -greedy.shape[1] :], greedy), name


def test_dropout_of_a_delta_follows_the_model_in_and_out_of_training() -> None:
    model: Any = llama().train()
    for name in ("a", "b"):
        move(attach(model, LoRA(r=2, lora_dropout=0.5), name), 0.1)
    for names in ("a", ["a", "b"]):
        assert not torch.equal(answer(model, names), answer(model, names))
    model.eval()
    for names in ("a", ["a", "b"]):
        assert torch.equal(answer(model, names), answer(model, names))
