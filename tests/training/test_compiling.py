"""Compiled blocks: equal to eager ones, one graph for all of a kind, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spectune.blocks import execution
from spectune.blocks.compile import compiled
from spectune.deltas import Delta, Method, attach, detach
from spectune.families import Family, describe
from spectune.methods import (
    METHODS,
    BottleneckAdapter,
    DoRA,
    FullFineTuning,
    LoRA,
    PrefixTuning,
)
from spectune.objectives import CAUSAL_LM
from spectune.training import TrainingConfig, decisions, train
from spectune.training.decisions import CompilingGain, compiling_gain
from tests.support import make_model, make_rows, make_tokenizer
from tests.support.quick import others_slow

DEPTH = 5
#: for what is not about a method: one weight a layer is compiled sooner than seven
ONE_LINEAR = ["down_proj"]


def gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": 60, "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 64}
    undropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **undropped, bos_token_id=0, eos_token_id=0))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=DEPTH,
                                        num_attention_heads=4, num_key_value_heads=2))  # fmt: skip


def undropped(method: type[Method]) -> Method:
    return BottleneckAdapter(dropout=0.0, bottleneck_dim=8) if method is BottleneckAdapter else method()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many graphs were made so far."""
    torch._dynamo.utils.counters.clear()
    return lambda: int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def built(make: Callable[[], PreTrainedModel], method: Method) -> tuple[PreTrainedModel, Delta]:
    torch.manual_seed(0)
    model = make()
    delta = attach(model, method)
    if not method.trains_base:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.train(), delta


def steps(model: PreTrainedModel, delta: Delta, lengths: tuple[int, ...] = (12, 12, 12)) -> tuple[list[float], Any]:
    losses = []
    for length in lengths:
        ids = torch.arange(2 * length).reshape(2, length) % 60
        loss, _ = CAUSAL_LM.loss_sum(model, {"input_ids": ids, "labels": ids})
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
    return losses, [p.grad.clone() for p in delta.parameters() if p.grad is not None]


#: one of each kind of module; the others are behind `-m slow`
KINDS = (FullFineTuning, BottleneckAdapter, PrefixTuning, LoRA)


@pytest.mark.parametrize("make", [pytest.param(gpt2, marks=pytest.mark.slow), llama])
@pytest.mark.parametrize("method", others_slow(METHODS, KINDS))
def test_equals_eager_and_all_layers_share_a_graph(
    make: Callable[[], PreTrainedModel], method: type[Method], graphs: Callable[[], int]
) -> None:
    expected = steps(*built(make, undropped(method)))
    model, delta = built(make, undropped(method))
    with compiled(model, delta.family, backend="aot_eager"):
        found = steps(model, delta)
        # the first layer's input may have no gradient: a graph of its own
        assert 1 <= graphs() <= 2, "one graph for each layer, or none"
        before = graphs()
        steps(model, delta)
        assert graphs() == before
    assert not torch._dynamo.utils.counters["graph_break"]
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert len(found[1]) == len(expected[1]) > 0
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_no_method_breaks_a_graph_after_another(graphs: Callable[[], int]) -> None:
    """In one process, without a reset; one of each kind by itself, and after another, is tested with every run."""
    for method in METHODS:
        model, delta = built(llama, undropped(method))
        with compiled(model, delta.family, backend="aot_eager"):
            steps(model, delta)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_one_model_after_another_is_right() -> None:
    """Dynamo would reuse the graph of the bare model: the delta of the next one then does nothing, without a word."""
    torch.manual_seed(0)
    bare = llama().train()
    ids = torch.arange(12)[None]
    with compiled(bare, describe(bare), backend="aot_eager"):
        before = bare(input_ids=ids, use_cache=False).logits
    for method in (LoRA(target_modules=ONE_LINEAR), LoRA(r=4, target_modules=ONE_LINEAR)):
        model, delta = built(llama, method)
        eager = model(input_ids=ids, use_cache=False).logits
        with compiled(model, delta.family, backend="aot_eager"):
            found = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)
        assert float((found - before).detach().abs().max()) > 1e-3


@pytest.mark.slow
def test_lengths_may_vary_without_a_graph_for_each(graphs: Callable[[], int]) -> None:
    model, delta = built(llama, LoRA(target_modules=ONE_LINEAR))
    lengths = (12, 14, 9, 17, 8, 21, 10)
    with compiled(model, delta.family, backend="aot_eager"):
        found = steps(model, delta, lengths)
        assert graphs() <= 4
    model, delta = built(llama, LoRA(target_modules=ONE_LINEAR))
    assert found[0] == pytest.approx(steps(model, delta, lengths)[0], rel=1e-5)


def test_leaves_nothing_behind(graphs: Callable[[], int]) -> None:
    model, delta = built(llama, LoRA())
    with pytest.raises(ZeroDivisionError), compiled(model, delta.family, backend="aot_eager"):
        raise ZeroDivisionError
    steps(model, delta)
    assert graphs() == 0
    detach(model, delta.name)
    attach(model, LoRA())  # a compiled model would be refused


def test_runs_as_it_is_without_gradients(graphs: Callable[[], int]) -> None:
    model, delta = built(llama, LoRA())
    with compiled(model, delta.family, backend="aot_eager"), torch.no_grad():
        model(input_ids=torch.arange(12)[None])
    assert graphs() == 0


@pytest.mark.slow  # what a block keeps is held by tests/planning/test_compiled_blocks.py, too
def test_keeps_less_than_eager_steps_do() -> None:
    """Normed inputs and gated products are made again: of a Llama block with LoRA, 12.5 instead of 23.4 d-units. DoRA
    keeps its linears' outputs as well, once: 14.4 of the like."""

    def kept(wanted: bool, method: Method) -> float:
        model, delta = built(llama, method)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        sizes: dict[int, int] = {}
        alive = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            alive.append(tensor)
            if tensor.untyped_storage()._cdata not in weights:
                sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            compiled(model, delta.family, backend="aot_eager_decomp_partition") if wanted else nullcontext(),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
            decoder(input_ids=torch.zeros(1, 48, dtype=torch.int64), use_cache=False)
        return sum(sizes.values())

    compiled_lora = kept(True, LoRA(r=2))
    assert compiled_lora < 0.7 * kept(False, LoRA(r=2))
    assert kept(True, DoRA(r=2)) < 1.4 * compiled_lora


def pays(family: Family, device_type: str, **run: int) -> bool:
    gain = compiling_gain(family, LoRA(), **run, device_type=device_type)
    return gain is not None and gain.pays


def test_a_run_is_compiled_where_that_pays() -> None:
    family = describe(llama())
    big = {"tokens": 10**9, "steps": 10**6, "length": 100}
    assert pays(family, "cuda", **big)
    assert not pays(family, "mps", **big)
    assert not pays(family, "cuda", tokens=10**4, steps=10, length=100)


def test_what_compiling_is_forecast_to_do_is_said_either_way() -> None:
    assert str(CompilingGain(steps=600.0, saved=180.0, wait=25.0)) == (
        "the blocks are compiled in the first step: it takes about 25 s, and saves about 3 min of about 10 min of steps"
    )
    assert str(CompilingGain(steps=40.0, saved=12.0, wait=25.0)) == (
        "the blocks are not compiled: it would take about 25 s to save 12 s of about 40 s of steps "
        "(torch_compile=true does it)"
    )
    assert "about 25 s, where the steps take about 4 s" in str(CompilingGain(steps=4.0, saved=1.2, wait=25.0))


@pytest.mark.parametrize("there", [True, False])
def test_long_runs_on_a_cpu_need_a_compiler(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "has_cpu_compiler", lambda: there)
    family = describe(llama())
    few = {"tokens": 10**6, "steps": 10**3, "length": 100}
    assert pays(family, "cpu", tokens=10**11, steps=10**6, length=100) is there
    assert not pays(family, "cpu", **few)


@pytest.mark.slow
def test_a_run_that_counts_its_memory_is_compiled_all_the_same(
    graphs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the first steps run under a dispatch mode; under one the compiler gives up on the blocks for good."""
    monkeypatch.setattr(execution, "compiled", partial(compiled, backend="aot_eager"))
    loss_sum = CAUSAL_LM.loss_sum
    monkeypatch.setattr(CAUSAL_LM, "loss_sum", lambda model, batch, fuse: loss_sum(model, batch))
    losses = []
    for wanted in (False, True):
        config = TrainingConfig(max_steps=6, learning_rate=1e-2, torch_compile=wanted, per_device_train_batch_size=4)
        result = train(make_model(), make_tokenizer(), LoRA(r=4), make_rows(), make_rows(6), config,
                       console=Console(quiet=True))  # fmt: skip
        losses.append(result.valid_loss)
        assert (graphs() > 0) == wanted
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
