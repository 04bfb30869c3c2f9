"""Recomputation in all its forms: the numbers of a step stay what they are, bit for bit, and less is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.blocks import offload
from spectune.blocks.recompute import Recomputation, recomputing
from spectune.blocks.selective import worth_keeping
from spectune.compute.memory import AllocationTracker
from spectune.deltas import attach, detach, route
from spectune.errors import ConfigError
from spectune.methods import BottleneckAdapter, FullFineTuning, LoRA, PromptTuning
from tests.contract.conftest import CASES, move, tokens
from tests.contract.families import FAMILIES, gpt2, llama
from tests.support import checkpointed_by_transformers, make_model
from tests.support.transfers import LateTransfers

#: what every run of the tests looks at on each family: the base itself, its inputs, its attention and its outputs
FEW = ("full", "prompt", "prefix", "lora")
MODES: tuple[Recomputation, ...] = ("selective", True, "offload")
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _everything_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload.HostStates.__init__, "__defaults__", (0,))


def gradients(
    make: Callable[[], PreTrainedModel], method: Any, mode: Recomputation, *, steps: int = 1, rows: int = 2
) -> list[Tensor | None]:
    """Losses and gradients of a model whose delta is not at its start; backward runs under another route."""
    torch.manual_seed(0)
    model = make()
    delta = attach(model, method, "trained")
    move(delta)
    if not delta.method.trains_base:
        move(attach(model, LoRA(r=3), "other"))  # the active one
    model.train()
    found: list[Tensor | None] = []
    with recomputing(model, mode, transfers=LateTransfers()):
        for step in range(steps):
            ids = tokens(rows, 9, seed=step)
            with route(model, "trained"):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            found.append(loss.detach())
    return [*found, *(p.grad for p in delta.parameters())]


def equal(these: list[Tensor | None], those: list[Tensor | None]) -> None:
    assert len(these) == len(those)
    for a, b in zip(these, those, strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


@pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(family, case, marks=() if family == "llama" or case in FEW else pytest.mark.slow)
        for family in ("gpt2", "llama", "mixtral")
        for case in CASES
    ],
)
def test_numbers_are_the_same_bit_for_bit(family: str, case: str) -> None:
    plain = gradients(FAMILIES[family], CASES[case], False)
    assert any(g is not None and bool(g.any()) for g in plain[1:])
    for mode in MODES:
        equal(gradients(FAMILIES[family], CASES[case], mode), plain)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_numbers_on_every_family(family: str, mode: Recomputation) -> None:
    equal(gradients(FAMILIES[family], LoRA(r=2), mode), gradients(FAMILIES[family], LoRA(r=2), False))


@pytest.mark.parametrize("mode", MODES)
def test_dropout_draws_the_same_again(mode: Recomputation) -> None:
    """In attention too, which selective recomputation would not run again otherwise."""

    def make() -> PreTrainedModel:
        model = gpt2()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        return model

    plain = gradients(make, LoRA(r=2, lora_dropout=0.2), False)
    equal(gradients(make, LoRA(r=2, lora_dropout=0.2), mode), plain)
    assert not torch.equal(plain[0], gradients(gpt2, LoRA(r=2), False)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_several_steps_and_a_mixed_batch(mode: Recomputation) -> None:
    equal(gradients(llama, LoRA(r=2), mode, steps=3), gradients(llama, LoRA(r=2), False, steps=3))
    found = []
    for chosen in (False, mode):
        torch.manual_seed(0)
        model = llama()
        deltas = [attach(model, method, name) for name, method in (("a", LoRA(r=2)), ("b", PromptTuning()))]
        for delta in deltas:
            move(delta)
        model.train()
        ids = tokens(3, 9)
        with recomputing(model, chosen, transfers=LateTransfers()), route(model, ["a", None, "b"]):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()  # outside of both
        found.append([p.grad for delta in deltas for p in delta.parameters()])
    equal(*found)


def kept_by_a_block(mode: Recomputation, method: Any, make: Callable[[], PreTrainedModel] = llama) -> int:
    """Bytes that a step's forward leaves behind, less what it leaves with one block less, on rows of 64 tokens."""
    found = []
    for fewer in (0, 1):
        torch.manual_seed(0)
        model = make()
        if fewer:
            del model.model.layers[1:2]
            model.config.num_hidden_layers -= 1
        attach(model, method)
        model.train()
        ids = tokens(4, 64)
        with recomputing(model, mode, transfers=LateTransfers()), AllocationTracker(model.parameters()) as tracker:
            before = tracker.live_bytes
            loss = model(input_ids=ids, use_cache=False).logits.sum()
            found.append(tracker.live_bytes - before)
        del loss
    return found[0] - found[1]


def test_each_mode_keeps_less_than_the_one_before() -> None:
    hidden = 4 * 64 * 32 * 4
    for method in (LoRA(r=2), BottleneckAdapter(bottleneck_dim=4, placement="block"), FullFineTuning()):
        kept = {mode: kept_by_a_block(mode, method) for mode in (False, *MODES)}
        assert kept[False] > 1.2 * kept["selective"], method
        assert kept["selective"] > 1.5 * kept[True], method
        # an adapter after the block is recomputed with it, though transformers would keep what it does
        assert kept[True] == hidden, method
        assert kept["offload"] == 0, method


def test_inputs_come_back_one_block_ahead_and_buffers_are_used_again() -> None:
    log: list[tuple[str, int]] = []
    transfers = LateTransfers(log)
    torch.manual_seed(0)
    model = llama()
    attach(model, LoRA(r=2))
    model.train()
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: log.append(("run", index)))
    with recomputing(model, "offload", transfers=transfers):
        for rows in (3, 2, 3):
            log.clear()
            ids = tokens(rows, 9)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            assert len(layers) == 3
            leave = [number for what, number in log if what == "leave"]
            assert sorted(leave) == [0, 1]
            assert log == [
                ("leave", leave[0]), ("run", 0),
                ("leave", leave[1]), ("run", 1),
                ("run", 2),  # the last block's stays
                ("come back", leave[1]), ("run", 2),
                ("come back", leave[0]), ("run", 1),
                ("run", 0),
            ]  # fmt: skip
    assert len(transfers.buffers) == 2


def test_a_graph_that_is_dropped_or_run_twice() -> None:
    transfers = LateTransfers()
    model = llama()
    attach(model, LoRA(r=2))
    model.train()
    ids = tokens(2, 9)
    with recomputing(model, "offload", transfers=transfers):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        del loss  # its buffers are free again
        first = model(input_ids=ids, labels=ids, use_cache=False).loss
        second = model(input_ids=ids, labels=ids, use_cache=False).loss  # before the backward of the first
        parameters = [p for p in model.parameters() if p.requires_grad]
        once = torch.autograd.grad(first, parameters, retain_graph=True)
        again = torch.autograd.grad(first, parameters)
        other = torch.autograd.grad(second, parameters)
    for a, b, c in zip(once, again, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert bool(a.isfinite().all())
    assert len(transfers.buffers) == 4


def test_small_tensors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload.HostStates.__init__, "__defaults__", (offload.LEAST_BYTES,))
    transfers = LateTransfers()
    model = llama()
    attach(model, LoRA(r=2))
    model.train()
    with recomputing(model, "offload", transfers=transfers):
        model(input_ids=tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss.backward()
    assert not transfers.buffers


def test_what_needs_a_gpu_is_refused_without_one() -> None:
    model = make_model()
    needs = "offload needs a CUDA device, and the model is on 'cpu'"
    with pytest.raises(ConfigError, match=needs), recomputing(model, "offload"):
        raise AssertionError
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_behind(mode: Recomputation) -> None:
    model = make_model()
    checkpointed_by_transformers(model)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    attach(model, LoRA(r=2))
    with recomputing(model, mode, transfers=LateTransfers()):
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    detach(model, "default")
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert {name: set(found) for name, found in after.items()} == {name: set(found) for name, found in before.items()}
    assert all(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))


def test_a_compiled_block_is_recomputed_as_it_is_and_selected_by_its_compiler() -> None:
    """`nn.Module.compile` puts its call where ours goes: a counting stand-in for it."""
    for mode, calls in ((True, 2), ("offload", 2), ("selective", 1)):
        model = llama()
        attach(model, LoRA(r=2))
        model.train()
        counts = []
        for layer in model.model.layers:
            counts.append([])

            def compiled(*args: Any, _layer: Any = layer, _count: list[int] = counts[-1], **kwargs: Any) -> Any:
                _count.append(1)
                return _layer._call_impl(*args, **kwargs)

            layer._compiled_call_impl = compiled
        with recomputing(model, mode, transfers=LateTransfers()):
            model(input_ids=tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss.backward()
        assert [len(count) for count in counts] == [calls] * 3
        assert all(layer._compiled_call_impl.__name__ == "compiled" for layer in model.model.layers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
def test_blocks_that_torch_compiles(mode: Recomputation) -> None:
    """Real compiled blocks, by a backend that makes no kernels: within the contract's tolerance of the plain ones."""
    found = []
    for compiled, chosen in ((False, False), (True, False), (True, mode)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = llama()
        delta = attach(model, LoRA(r=2))
        move(delta)
        model.train()
        if compiled:
            for layer in model.model.layers:
                layer.compile(backend="aot_eager")
        with recomputing(model, chosen, transfers=LateTransfers()):
            loss = model(input_ids=tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss
            loss.backward()
        found.append([p.grad for p in delta.parameters()])
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert a is not None
            assert b is not None
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5)


def test_what_takes_its_place_is_an_error() -> None:
    model = make_model()
    checkpointed_by_transformers(model)
    layers = model.get_submodule("transformer.h")
    with pytest.raises(RuntimeError, match="took its place: compile before that"), recomputing(model, True):
        next(layers.children()).compile(backend="eager")
    assert all(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))


def test_a_cache_is_never_written_twice() -> None:
    model = llama()
    attach(model, LoRA(r=2))
    model.train()
    with recomputing(model, True):
        found = model(input_ids=tokens(2, 9), labels=tokens(2, 9), use_cache=True)
        found.loss.backward()
    cache = getattr(found, "cache", None) or found.past_key_values
    assert cache.get_seq_length() == 9


def test_what_is_worth_keeping() -> None:
    wide, narrow = torch.empty(8, 300, device="meta"), torch.empty(8, 16, device="meta")
    assert worth_keeping(aten.mm.default, (wide, wide.T), {}, 256)
    assert not worth_keeping(aten.mm.default, (narrow, narrow.T), {}, 256)
    assert worth_keeping(aten.addmm.default, (narrow, wide, wide.T), {}, 256)
    heads, keys = torch.empty(4, 512, 64, device="meta"), torch.empty(4, 64, 512, device="meta")
    assert not worth_keeping(aten.bmm.default, (heads, keys), {}, 16)  # scores
    assert worth_keeping(aten.bmm.default, (torch.empty(4, 512, 512, device="meta"), heads), {}, 16)
    assert not worth_keeping(aten.add_.Tensor, (wide, wide), {}, 16)
    assert not worth_keeping(aten.mul.Tensor, (wide, wide), {}, 16)
    flash = aten._scaled_dot_product_flash_attention.default
    assert worth_keeping(flash, (heads, heads, heads), {}, 16)
    assert worth_keeping(flash, (heads, heads, heads, 0.0), {}, 16)
    assert not worth_keeping(flash, (heads, heads, heads, 0.1), {}, 16)
    assert not worth_keeping(flash, (heads, heads, heads), {"dropout_p": 0.1}, 16)
