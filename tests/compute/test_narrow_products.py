"""Products with something narrow, grouped: fewer of them, the same results, and none that needs another's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig, LlamaForCausalLM

from spectune.blocks.compile import compiled
from spectune.blocks.narrow_products import GroupNarrowProducts
from spectune.deltas import attach
from spectune.methods import LoRA

MM = torch.ops.aten.mm.default
T, D, R = 12, 80, 4


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def products(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[int, int]:
    """How many there are before and after; the results are compared."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    before = len(module.graph.find_nodes(op="call_function", target=MM))
    GroupNarrowProducts()(module.graph)
    module.graph.lint()
    module.recompile()
    for found, wanted in zip(module(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(found, wanted)
    return before, len(module.graph.find_nodes(op="call_function", target=MM))


def test_one_input_many_narrow_ones() -> None:
    """Of different ranks, too; and one that is as wide as the input stays by itself."""

    def function(x: Tensor, a: Tensor, b: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return x @ a.T, (x @ w).relu(), x @ b.T, x @ c

    given = numbers(T, D), numbers(R, D), numbers(2 * R, D, seed=1), numbers(D, R, seed=2), numbers(D, D)
    assert products(function, *given) == (4, 2)


def test_gradients_of_narrow_ones() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return a.T @ x, b.T @ x, g.T @ x

    assert products(function, numbers(D, D), numbers(D, R), numbers(D, 2 * R), numbers(D, D, seed=3)) == (3, 2)


def test_summands_are_joined() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor, w: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        total = (x @ w).view(3, 4, D) + (a @ down).view(3, 4, D)
        total = total + (x @ w.T).view(3, 4, D)
        return ((total + (b @ up).view(3, 4, D)).sin(),)

    given = numbers(T, D), numbers(T, R), numbers(T, 2 * R), numbers(D, D), numbers(R, D), numbers(2 * R, D)
    assert products(function, *given) == (4, 3)


def test_a_sum_that_is_used_in_between_is_left_alone() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        half = x + a @ down
        return half.cos(), half + b @ up

    given = numbers(T, D), numbers(T, R), numbers(T, R, seed=1), numbers(R, D), numbers(R, D, seed=1)
    assert products(function, *given) == (2, 2)


def test_what_needs_another_is_not_put_with_it() -> None:
    def function(x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        low = x @ a.T
        again = x @ (low.sum(0)[:, None] * a).T
        return low, again

    assert products(function, numbers(T, D), numbers(R, D)) == (2, 2)


def test_groups_that_need_each_other_are_not_both_made() -> None:
    """a1 and a2 share x, b1 and b2 share y; a2 needs b1 and b2 needs a1: one of the two can be grouped."""

    def function(x: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        a1, b1 = x @ a.T, y @ a.T
        return a1, b1, x @ (b1.sum(0)[:, None] * a).T, y @ (a1.sum(0)[:, None] * a).T

    assert products(function, numbers(T, D), numbers(T, D, seed=1), numbers(R, D)) == (4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [1.0, 0.5, 0.0])
def test_in_blocks_that_inductor_compiles(checkpointing: float) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, hidden_size=256, num_hidden_layers=3, num_attention_heads=8,
                         num_key_value_heads=4, intermediate_size=512)  # fmt: skip
    model = LlamaForCausalLM(config).train()
    delta = attach(model, LoRA(r=8, rank_pattern={"k_proj": 4}), "task")
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.randint(1, 128, (2, 32))

    def step() -> list[Tensor]:
        for parameter in delta.parameters():
            parameter.grad = None
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *[p.grad for p in delta.parameters() if p.grad is not None]]

    wanted = step()
    torch._dynamo.reset()
    with compiled(model, delta.family, memory_budget=checkpointing):
        found = step()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-4)
