"""Compiled blocks that recompute within their graphs: the gradients of plain blocks, and no more made than needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import PreTrainedModel

from spectune.blocks import partition
from spectune.blocks.compile import block_of, compiled, compiler_settings, memory_budget
from spectune.blocks.recompute import Recomputation, recomputing
from spectune.compute.memory import AllocationTracker
from spectune.deltas import Delta, Method, attach, route
from spectune.methods import FullFineTuning, LoRA, PromptTuning
from spectune.training.decisions import has_cpu_compiler
from tests.contract.conftest import CASES, move, refusal, tokens
from tests.contract.families import FAMILIES, gpt2, llama
from tests.support.graphs import Cut


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(
    make: Callable[[], Any],
    method: Method,
    mode: Recomputation | None,
    *,
    backend: Any = None,
    rows: Any = "trained",
    prepare: Callable[[Any], None] = lambda model: None,
    **inputs: Any,
) -> list[Tensor]:
    """Loss and gradients, backward outside of everything. `mode`: None is not compiled. In float64, but for experts,
    whose product there is none of in it."""
    torch.manual_seed(0)
    model = make()
    model = model if model.config.model_type == "mixtral" else model.double()
    delta = attach(model, method, "trained")
    prepare(model)
    move(delta)
    if not method.trains_base:
        move(attach(model, LoRA(r=3), "other"))  # the active one
    model.train()
    ids = tokens(3, 9)
    torch.manual_seed(1)
    with (
        blocks(model, delta, mode, backend or Cut()),
        recomputing(model, mode or False),
        route(model, rows),
    ):
        loss = model(input_ids=ids, labels=ids, **{"use_cache": False, **inputs}).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in delta.parameters() if p.grad is not None)]


def blocks(model: PreTrainedModel, delta: Delta, mode: Any, backend: Any) -> AbstractContextManager[None]:
    """Compiled for a mode of recomputation; as they are for None."""
    if mode is None:
        return nullcontext()
    return compiled(model, delta.family, backend=backend, memory_budget=memory_budget(mode))


def equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    rounding = 1e-6 if wanted[0].dtype == torch.float64 else 1e-4
    assert len(found) == len(wanted) > 1
    for one, other in zip(found, wanted, strict=True):  # a delta's weights are float32
        # gradients of keys' biases are nothing but rounding
        torch.testing.assert_close(
            one, other, rtol=rounding, atol=rounding * float(other.abs().max()) + 1e-9 * rounding
        )


#: what a block can have to recompute: its own weights' inputs, a module behind it, keys in front, rows that are longer,
#: products beside its own; other methods are behind `-m slow`, and so are all other families
FAST = {"full", "prefix", "lora"}
SLOW = pytest.mark.slow


@pytest.mark.parametrize("case", [case if case in FAST else pytest.param(case, marks=SLOW) for case in CASES])
@pytest.mark.parametrize("family", [f if f == "llama" else pytest.param(f, marks=SLOW) for f in FAMILIES])
def test_gradients_are_those_of_plain_blocks(family: str, case: str) -> None:
    """The first block's input has a gradient or none, outputs may be tuples, lower blocks may have nothing to train."""
    if refusal(family, CASES[case]) is not None:
        pytest.skip("the method refuses this family")
    backend = Cut()
    wanted = gradients(FAMILIES[family], CASES[case], None)
    equal(gradients(FAMILIES[family], CASES[case], True, backend=backend), wanted)
    assert sum(backend.backward) > 0


def freeze_lower_blocks(model: Any) -> None:
    for layer in model.get_decoder().layers[:2]:
        layer.requires_grad_(False)


def test_frozen_lower_blocks() -> None:
    wanted = gradients(llama, LoRA(r=2), None, prepare=freeze_lower_blocks)
    equal(gradients(llama, LoRA(r=2), True, prepare=freeze_lower_blocks), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("method", [LoRA(r=2), PromptTuning()])
def test_rows_of_several_deltas(method: Method) -> None:
    rows = ["trained", None, "other"]
    equal(gradients(llama, method, True, rows=rows), gradients(llama, method, None, rows=rows))


@SLOW
def test_a_cache_is_written_once() -> None:
    equal(gradients(llama, LoRA(r=2), True, use_cache=True), gradients(llama, LoRA(r=2), None, use_cache=True))


@pytest.mark.parametrize(("method", "last"), [pytest.param(FullFineTuning(), 1, marks=SLOW), (LoRA(r=2), 2)])
@pytest.mark.slow
def test_the_last_product_is_not_made_again(method: Method, last: int) -> None:
    """Nor is LoRA's second one there, which is added to it."""
    plain, lean = Cut(), Cut()
    gradients(llama, method, False, backend=plain)
    gradients(llama, method, True, backend=lean)
    assert lean.forward == plain.forward
    again = [made - once for made, once in zip(lean.backward, plain.backward, strict=True)]
    # all blocks are one graph, or two where the first one's input needs no gradient
    assert again == [made - last for made in plain.forward]


def kept_while_counted(mode: Recomputation) -> int:
    """Bytes that a block's forward leaves behind for rows of 64 tokens while tensors are counted one by one, as in a
    run's first steps on a CPU: nothing is compiled then."""
    found = []
    for fewer in (0, 1):
        torch.manual_seed(0)
        model: Any = llama()
        if fewer:
            del model.model.layers[1:2]
            model.config.num_hidden_layers -= 1
        delta = attach(model, LoRA(r=2))
        model.train()
        with (
            compiled(model, delta.family, backend=Cut(), memory_budget=memory_budget(mode)),
            recomputing(model, mode),
            AllocationTracker(model.parameters()) as tracker,
        ):
            before = tracker.live_bytes
            loss = model(input_ids=tokens(4, 64), use_cache=False).logits.sum()
            found.append(tracker.live_bytes - before)
            loss.backward()
    return found[0] - found[1]


def test_blocks_that_are_not_compiled_yet_are_recomputed_from_outside() -> None:
    hidden = 4 * 64 * 32 * 4
    assert kept_while_counted(True) == hidden
    assert 1.2 * kept_while_counted("selective") < kept_while_counted(False)


def test_a_pass_that_was_counted_may_go_back_when_blocks_compile() -> None:
    found = []
    for mode in (None, "selective", True):
        torch.manual_seed(0)
        model = llama()
        delta = attach(model, LoRA(r=2))
        move(delta)
        model.train()
        with (
            blocks(model, delta, mode, Cut()),
            recomputing(model, mode or False),  # type: ignore[arg-type]
        ):
            with AllocationTracker(model.parameters()):
                loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in delta.parameters() if p.grad is not None)])
    equal(found[1], found[0])
    equal(found[2], found[0])


class Dropping(nn.Module):
    """Attention that drops weights, or a feed-forward that drops activations, with a residual beside."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention, self.up, self.down = attention, nn.Linear(16, 48), nn.Linear(16 if attention else 48, 16)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        if self.attention:
            query, key, value = inner.view(4, 8, 3, 2, 8).permute(2, 0, 3, 1, 4)
            inner = scaled_dot_product_attention(query, key, value, dropout_p=0.3, is_causal=True)
            inner = inner.transpose(1, 2).reshape(4, 8, 16)
        else:
            inner = gelu(nn.functional.dropout(inner, 0.3))
        return x + nn.functional.dropout(self.down(inner), 0.2)


def dropping(budget: float, attention: bool, backend: Any) -> list[Tensor]:
    """Output and gradients; the output is linear in the last weights, whose gradients must be of what forward drew."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Dropping(attention).double()
    x, weight = (torch.randn(4, 8, 16, dtype=torch.float64) for _ in "12")
    run = torch.compile(block_of(), backend=backend)
    torch.manual_seed(1)
    with compiler_settings(budget):
        out = run(block, (x.requires_grad_(),), {})
        (out * weight).sum().backward()
    last = [block.down.weight, block.down.bias]
    by_gradient = sum((p * p.grad).sum() for p in last if p.grad is not None)
    torch.testing.assert_close(by_gradient, ((out - x) * weight).sum(), rtol=1e-9, atol=1e-9)
    return [out.detach(), *(t.grad for t in (x, *block.parameters()) if t.grad is not None)]


@pytest.mark.parametrize("attention", [True, pytest.param(False, marks=SLOW)])
def test_nothing_is_drawn_twice(attention: bool) -> None:
    wanted = dropping(1.0, attention, Cut())
    for budget in (memory_budget("selective"), 0.1, memory_budget(True)):
        equal(dropping(budget, attention, Cut()), wanted)


def test_a_partitioner_that_would_draw_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "LEAST_BUDGET", 0.0)  # at which marks do not count
    with pytest.raises(RuntimeError, match="in backward again, which makes gradients wrong"):
        dropping(0.0, False, Cut())


@pytest.mark.skipif(not has_cpu_compiler(), reason="makes kernels for the CPU")
@pytest.mark.parametrize(
    ("mode", "attention"),
    [("selective", True), pytest.param(True, True, marks=SLOW), pytest.param(True, False, marks=SLOW)],
)
def test_nor_in_inductor_s_graphs(mode: Recomputation, attention: bool) -> None:
    """Whose masks come from a number that is drawn once."""
    dropping(memory_budget(mode), attention, "inductor")


@pytest.mark.parametrize("mode", [pytest.param("selective", marks=SLOW), True])
@pytest.mark.slow
def test_dropout_of_models_and_methods_is_drawn_once(mode: Recomputation) -> None:
    def drop(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3

    method = LoRA(r=2, lora_dropout=0.2)
    equal(gradients(gpt2, method, mode, prepare=drop), gradients(gpt2, method, False, prepare=drop))
