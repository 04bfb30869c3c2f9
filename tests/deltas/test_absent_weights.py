"""Weights that are not where the model holds them: methods that need none of them are exact, the others refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectune.deltas import Attachment, Method, attach, detach, merge, route
from spectune.errors import ConfigError
from spectune.methods import (
    IA3,
    BitFit,
    BottleneckAdapter,
    DoRA,
    FullFineTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
)
from tests.contract.conftest import move, put_on, tokens
from tests.contract.families import gpt2, llama

accelerate = pytest.importorskip("accelerate")

BESIDE: list[Method] = [
    LoRA(r=2), BitFit(), PrefixTuning(num_virtual_tokens=2), PromptTuning(num_virtual_tokens=2), IA3(),
    BottleneckAdapter(bottleneck_dim=4, dropout=0.0),
]  # fmt: skip
NEED_WEIGHTS: list[Method] = [DoRA(r=2), FullFineTuning()]


def named(method: Method) -> str:
    return method.name


def made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def layers_on_disk(model: Any, folder: Path) -> Any:
    """As `from_pretrained(device_map=...)` leaves a model whose last layers have no room."""
    inner, path = (model.model, "model") if hasattr(model, "model") else (model.transformer, "transformer")
    places = {f"{path}.{name}": "cpu" for name, _ in inner.named_children() if name not in ("layers", "h")}
    stack = "layers" if path == "model" else "h"
    places |= {"lm_head": "cpu"} | {f"{path}.{stack}.{number}": "disk" if number else "cpu" for number in range(3)}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def answers(model: Any) -> list[Tensor]:
    with torch.no_grad():
        found = []
        for name in ("task", None):
            with route(model, name):
                found.append(model(input_ids=tokens()).logits)
    return found


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("method", BESIDE, ids=named)
def test_with_layers_on_disk_methods_beside_the_weights_are_exact(
    make: Callable[[], Any], method: Method, tmp_path: Path
) -> None:
    whole = made(make)
    move(put_on(whole, method))
    expected = answers(whole)
    model = layers_on_disk(made(make), tmp_path)
    delta = put_on(model, method)
    move(delta)
    assert all(torch.equal(got, wanted) for got, wanted in zip(answers(model), expected, strict=True))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    whole(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients = dict(Attachment.of(whole).deltas["task"].named_parameters())  # type: ignore[union-attr]
    for name, parameter in delta.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradients[name].grad, atol=1e-6)
    delta.save(tmp_path / "saved")
    if method.can_merge:
        with pytest.raises(ConfigError, match="merging is refused: accelerate loads the weights of"):
            merge(model, "task")
    assert torch.equal(answers(model)[0], expected[0])  # a refused merge has changed nothing
    detach(model, "task")
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, expected[1])


def everything_on_the_cpu_for_each_call(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu")


def everything_on_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, str(folder), execution_device="cpu")


def on_meta(model: Any, folder: Path) -> Any:
    return model.to("meta")


def partly_on_meta(model: Any, folder: Path) -> Any:
    model.model.layers[1].to("meta")
    return model


def sharded_away(model: Any, folder: Path) -> Any:
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    return model


REFUSED = [
    (everything_on_the_cpu_for_each_call, r"token embeddings|own weights"),
    (everything_on_disk, r"token embeddings|own weights"),
    (on_meta, r"30 modules .*meta device.*from_pretrained"),
    (partly_on_meta, r"9 modules .*meta device.*model\.layers\.1\.self_attn\.q_proj"),
    (sharded_away, r"are empty here .*DeepSpeed"),
]


@pytest.mark.parametrize("method", [LoRA(r=2), PromptTuning(), *NEED_WEIGHTS], ids=named)
@pytest.mark.parametrize(("how", "words"), [*REFUSED, (layers_on_disk, "")])
def test_what_cannot_be_right_is_refused_by_name_and_the_model_is_as_it_was(
    how: Callable[[Any, Path], Any], words: str, method: Method, tmp_path: Path
) -> None:
    if how is layers_on_disk and method not in NEED_WEIGHTS:
        return  # these work, see above
    model = how(made(llama), tmp_path)
    before = [(name, p.device, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(ConfigError, match=rf"^{method.label} is refused(?s:.*)({words or 'accelerate loads'})"):
        attach(model, method, "task", keep_base=method.trains_base)
    assert Attachment.of(model) is None
    assert [(name, p.device, p.requires_grad) for name, p in model.named_parameters()] == before


def test_a_model_whose_hooks_load_nothing_is_like_any_other() -> None:
    model = accelerate.dispatch_model(made(llama), {"": "cpu"}, force_hooks=True)
    move(attach(model, FullFineTuning(), "task", keep_base=True))
    tuned, bare = answers(model)
    assert not torch.equal(tuned, bare)


def test_another_mistake_is_not_laid_to_the_offload(tmp_path: Path) -> None:
    model = layers_on_disk(made(llama), tmp_path)
    with pytest.raises(ConfigError, match="'nothing' matches no linear"):
        attach(model, LoRA(target_modules=("nothing",)), "task")
