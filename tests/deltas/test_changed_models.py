"""Models that are changed while deltas are on them: what can go on does, and detach always works."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectune.deltas import Attachment, Method, attach, attached, detach, merge, route
from spectune.errors import ConfigError
from spectune.methods import BottleneckAdapter, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from spectune.storage import load_delta
from tests.contract.conftest import move, put_on, tokens
from tests.contract.families import gpt2, llama
from tests.support.quick import others_slow

PROJECTED = PrefixTuning(num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=8)
METHODS: list[Method] = [
    LoRA(r=2), BottleneckAdapter(bottleneck_dim=4, dropout=0.0), PROJECTED, PromptTuning(num_virtual_tokens=2),
    FullFineTuning(),
]  # fmt: skip
#: tokens that are there however the vocabulary is resized
IDS = tokens(2, 6).clamp(max=80)


def named(method: Method) -> str:
    return method.name


def layers(model: Any) -> Any:
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def answer(model: Any, name: str | None = "task") -> Tensor:
    with torch.no_grad(), route(model, name):
        logits: Tensor = model(input_ids=IDS).logits
    return logits[..., :80]


def made(make: Callable[[], Any], method: Method) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    move(put_on(model, method))
    return model


def assert_nothing_left(model: Any) -> None:
    assert Attachment.of(model) is None
    assert "spectune" not in str(model.config._attn_implementation)
    for module in model.modules():
        assert "deltas" not in module._modules
        assert "_spectune_state" not in module.__dict__
        assert not any("spectune" in str(hook) for hook in module._forward_hooks.values())
        assert not any("spectune" in str(hook) for hook in module._forward_pre_hooks.values())


# -- changes that leave every place of a delta where it is ------------------------------------------------------------


def assigned(model: Any) -> Any:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model


def resized(model: Any) -> Any:
    model.resize_token_embeddings(101)
    return model


def untied(model: Any) -> Any:
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    return model


def eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


def doubled(model: Any) -> Any:
    return model.double().float()


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved_whole(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def wrapped(model: Any) -> Any:
    """A layer in a wrapper of somebody's, which calls it."""

    class Wrapper(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.layer(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name) if name == "layer" else getattr(self.layer, name)

    layers(model)[1] = Wrapper(layers(model)[1])
    return model


FEW = ("lora", "prefix", "full")
CHANGES = [assigned, resized, untied, eager, doubled, copied, pickled, saved_whole, wrapped]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", others_slow(METHODS, [m for m in METHODS if m.name in FEW]), ids=named)
def test_a_change_that_leaves_the_places_changes_nothing(
    method: Method, change: Callable[[Any], Any], tmp_path: Path
) -> None:
    make = gpt2
    model = made(make, method)
    trainable = {name: True for name, _ in model.named_parameters() if ".deltas." not in name}
    tuned, bare = answer(model), answer(model, None)
    changed = change(model)
    assert torch.allclose(answer(changed), tuned, atol=1e-5)
    if change is resized and method.trains_base:  # the copy of the base has other shapes
        with pytest.raises(
            ConfigError, match=r"transformer\.wte\.weight, lm_head\.weight changed shape .*resize_token_embeddings"
        ):
            detach(changed, "task")
        assert list(attached(changed)) == ["task"]
        changed.resize_token_embeddings(97)
    assert torch.allclose(answer(changed, None), bare, atol=1e-5)
    attached(changed)["task"].save(tmp_path / "saved")
    if method.can_merge and change is not wrapped and change is not untied:
        assert torch.allclose(answer(merge(changed, "task"), None), tuned, atol=1e-4)
    detach(changed, "task")
    assert_nothing_left(changed)
    assert torch.allclose(answer(changed, None), bare, atol=1e-5)
    # what was put in a weight's place takes a gradient, as that did
    assert {name: p.requires_grad for name, p in changed.named_parameters() if name in trainable} == {
        name: True for name, _ in changed.named_parameters() if name in trainable
    }
    if changed is not model:  # a copy is one of its own
        assert torch.equal(answer(model), tuned)
        assert torch.equal(answer(model, None), bare)
    elif not method.trains_base and change is not wrapped and change is not resized:
        load_delta(changed, tmp_path / "saved", "again")
        assert torch.allclose(answer(changed, "again"), tuned, atol=1e-5)


@pytest.mark.parametrize("method", [LoRA(r=2), BottleneckAdapter(bottleneck_dim=4, dropout=0.0)], ids=named)
def test_a_layer_that_was_put_in_as_a_copy_is_the_bases_after_detach(method: Method) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    layers(model)[1] = copy.deepcopy(layers(model)[0])
    bare = model(input_ids=IDS).logits
    torch.manual_seed(0)
    model = llama().eval()
    move(put_on(model, method))
    layers(model)[1] = copy.deepcopy(layers(model)[0])
    detach(model, "task")
    assert torch.equal(model(input_ids=IDS).logits, bare)
    assert not any("deltas" in name for name in model.state_dict())
    assert not any("spectune" in str(hook) for m in model.modules() for hook in m._forward_hooks.values())


# -- changes that take a delta's place away ---------------------------------------------------------------------------


def another_layer(model: Any) -> Any:
    layers(model)[1] = copy.deepcopy(layers(model)[2])
    for module in layers(model)[1].modules():
        module._modules.pop("deltas", None)
        module._forward_hooks.clear()
        module.__dict__.pop("_spectune_state", None)
    return model


def another_linear(model: Any) -> Any:
    model.model.layers[1].self_attn.q_proj = nn.Linear(32, 32, bias=False)
    return model


def a_layer_less(model: Any) -> Any:
    del layers(model)[2]
    model.config.num_hidden_layers = 2
    return model


TAKEN = [
    (LoRA(r=2), another_layer, r"model\.layers\.1\.self_attn\.q_proj, .* and 2 more"),
    (LoRA(r=2), another_linear, r"^model\.layers\.1\.self_attn\.q_proj: replaced"),
    (LoRA(r=2), a_layer_less, r"model\.layers\.2\."),
    (BottleneckAdapter(bottleneck_dim=4, dropout=0.0), another_layer, r"^model\.layers\.1: replaced"),
    (PROJECTED, another_layer, r"^model\.layers\.1\.self_attn: replaced"),
]


@pytest.mark.parametrize(("method", "change", "words"), TAKEN)
def test_a_place_that_is_taken_is_one_error_until_it_is_given_back(
    method: Method, change: Callable[[Any], Any], words: str, tmp_path: Path
) -> None:
    model = made(llama, method)
    move(attach(model, PromptTuning(num_virtual_tokens=2), "prompt"))
    tuned, prompted = answer(model), answer(model, "prompt")
    before = dict(layers(model)._modules)
    linear = before["1"].self_attn.q_proj
    change(model)
    with pytest.raises(ConfigError, match=words), route(model, "task"):
        pass
    for act in (lambda: merge(model, "task"), lambda: attach(model, LoRA(r=3), "more")):
        if method.can_merge or "more" in str(act):
            with pytest.raises(ConfigError, match=words):
                act()
    detach(model, "prompt")
    assert not torch.equal(answer(model, None), prompted)  # the bare base runs, as it is now
    attached(model)["task"].save(tmp_path / "saved")
    Attachment.of(model).state.active = type(Attachment.of(model).state.active).of("task")  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=words):
        model(input_ids=IDS)
    # given back, it is as ever
    layers(model)._modules.update(before)
    layers(model)[1].self_attn.q_proj = linear
    model.config.num_hidden_layers = 3
    assert torch.equal(answer(model), tuned)
    change(model)
    detach(model, "task")
    assert_nothing_left(model)
    assert torch.isfinite(answer(model, None)).all()
    for layer in before.values():
        assert_nothing_left_in(layer)


def assert_nothing_left_in(module: nn.Module) -> None:
    for part in module.modules():
        assert "deltas" not in part._modules
        assert "_spectune_state" not in part.__dict__
        assert not part._forward_hooks
