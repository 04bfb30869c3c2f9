"""What surrounds a call of attach, load or merge decides nothing of what it makes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectune.deltas import Method, attach, detach, merge, route
from spectune.methods import BottleneckAdapter, DoRA, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from spectune.storage import load_delta
from tests.contract.conftest import move, tokens
from tests.contract.families import gpt2, llama
from tests.support.quick import others_slow

METHODS: list[Method] = [
    LoRA(r=2), DoRA(r=2), PrefixTuning(num_virtual_tokens=2), PromptTuning(num_virtual_tokens=2, init="random"),
    BottleneckAdapter(bottleneck_dim=4, dropout=0.0), FullFineTuning(),
]  # fmt: skip
#: whose weights are drawn, computed from the base's, taken from its embeddings, and copied
FEW = ("lora", "dora", "prompt", "full")
IDS = tokens(2, 6)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "another device by default": default_device,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def answer(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def gradients(model: Any) -> dict[str, Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def made() -> Any:
    torch.manual_seed(0)
    return llama(2).eval()


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize(
    "method", others_slow(METHODS, [m for m in METHODS if m.name in FEW]), ids=lambda method: str(method.name)
)
def test_weights_are_the_same_and_can_be_trained(method: Method, around: str, tmp_path: Path) -> None:
    model, other = made(), made()
    attach(model, method, "task", keep_base=method.trains_base)
    with SURROUNDINGS[around]():
        delta = attach(other, method, "task", keep_base=method.trains_base)
    assert all(parameter.dtype == torch.float32 for parameter in delta.parameters())
    assert torch.equal(answer(other), answer(model))
    expected = gradients(model)
    for name, gradient in gradients(other).items():
        assert torch.equal(gradient, expected[name])
    move(delta)
    tuned = answer(other)
    delta.save(tmp_path / "saved")
    if method.can_merge:
        with SURROUNDINGS[around]():
            merged = merge(other, "task")
        assert torch.allclose(answer(merged), tuned, atol=1e-5)
        assert gradients(merged.train())
    with SURROUNDINGS[around]():
        detach(other, "task")
    if not method.trains_base:
        with SURROUNDINGS[around]():
            load_delta(other, tmp_path / "saved", "task", trainable=True)
        assert torch.equal(answer(other), tuned)
        assert gradients(other)


def test_a_deltas_weights_stay_float32_while_the_base_is_cast_and_computes_in_its_precision() -> None:
    model: Any = gpt2().eval()
    for name, method in (("a", LoRA(r=2)), ("b", PrefixTuning(num_virtual_tokens=2)), ("c", PromptTuning())):
        move(attach(model, method, name))
    with torch.no_grad():
        answers = {}
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            model.to(dtype)
            for names in ("a", "b", ["a", "b"], ["b", None]):
                with route(model, names):
                    answers[str(names), dtype] = model(input_ids=IDS).logits
                assert answers[str(names), dtype].dtype == dtype
            if dtype is torch.float64:
                rows = answers["['a', 'b']", dtype]
                assert torch.allclose(rows[0], answers["a", dtype][0], atol=1e-12)
                assert torch.allclose(rows[1], answers["b", dtype][1], atol=1e-12)
    for names in ("a", "b"):
        assert torch.allclose(answers[names, torch.float32].double(), answers[names, torch.float64], atol=1e-5)
        assert torch.allclose(answers[names, torch.float32], answers[names, torch.bfloat16].float(), atol=0.1)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if ".deltas." in name)
