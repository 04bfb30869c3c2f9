"""Captured blocks give what blocks give. CUDA graphs need a GPU: here what is captured is run again instead, into the
same memory, which tries all but the capture itself (tests/cuda does that)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from spectune.blocks import graphed_block
from spectune.blocks.cuda_graphs import BEFORE_CAPTURE, graphed
from spectune.blocks.graphed_block import Gradients
from spectune.deltas import Method, attach, route
from spectune.errors import ConfigError
from spectune.families import describe
from spectune.methods import IA3, METHODS, BitFit, BottleneckAdapter, DoRA, FullFineTuning, LoRA, PrefixTuning
from spectune.objectives import CAUSAL_LM
from spectune.training import TrainingConfig
from spectune.training.decisions import decide, launch_bound
from tests.contract.conftest import move
from tests.training.test_compiling import built, gpt2, llama, undropped


class Again:
    """Runs what was captured once more, and puts the results where the first ones are."""

    replays = 0

    def running(self, release: Callable[[], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def capture(self, function: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], None]]:
        with torch.enable_grad():
            places = function()

        def replay() -> None:
            type(self).replays += 1
            with torch.enable_grad():
                made = function()
            for place, new in zip(places, made, strict=True):
                if isinstance(place, Tensor):
                    place.copy_(new)

        return places, replay


#: passes until all is captured: traced in the first, captured in the next, proved in that after it
BEFORE = BEFORE_CAPTURE


def batches(count: int, length: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 60, (2, length), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "labels": i} for i in ids]


def passes(model: Any, delta: Any, given: list[dict[str, Tensor]], every: int = 1) -> tuple[list[float], list[Tensor]]:
    """Losses, and the gradients of all passes, cleared after `every`."""
    losses, gradients = [], []
    for number, batch in enumerate(given, start=1):
        loss, _ = CAUSAL_LM.loss_sum(model, batch)
        loss.backward()
        losses.append(loss.item())
        if number % every == 0:
            for p in delta.parameters():
                if p.grad is not None:
                    gradients.append(p.grad.clone())
                p.grad = None
    return losses, gradients


def check(make: Any, method: Method, given: list[dict[str, Tensor]], every: int = 1) -> int:
    """Equal to the plain passes, bit for bit. Returns how many captured passes were replayed."""
    model, delta = built(make, method)
    expected = passes(model, delta, given, every)
    model, delta = built(make, method)
    Again.replays = 0
    with graphed(model, delta.family, list(delta.parameters()), capture=Again):
        losses, gradients = passes(model, delta, given, every)
    assert losses == expected[0]
    assert len(gradients) == len(expected[1]) > 0
    for one, other in zip(gradients, expected[1], strict=True):
        assert torch.equal(one, other)
    assert not any("_compiled_call_impl" in m.__dict__ for m in model.modules())
    return Again.replays


@pytest.mark.parametrize(
    ("make", "method"),
    [
        pytest.param(make, method, marks=() if make is llama or method in (FullFineTuning, LoRA) else pytest.mark.slow)
        for make in (gpt2, llama)
        for method in METHODS
    ],
)
def test_equals_plain_blocks(make: Any, method: type[Method]) -> None:
    count = BEFORE + 3
    replays = check(make, undropped(method), batches(count))
    depth = 5
    # of every pass that was replayed, all blocks forward and all but perhaps the first backward
    assert replays >= 3 * (2 * depth - 1)


def test_dropout_draws_what_it_would_draw() -> None:
    """The pass in which a capture is proved draws its numbers twice, and goes on as if it had not."""
    torch.manual_seed(5)
    check_model, delta = built(llama, BottleneckAdapter(dropout=0.5, bottleneck_dim=8))
    torch.manual_seed(5)
    expected, _ = passes(check_model, delta, batches(BEFORE + 2))
    model, delta = built(llama, BottleneckAdapter(dropout=0.5, bottleneck_dim=8))
    torch.manual_seed(5)
    Again.replays = 0
    with graphed(model, delta.family, list(delta.parameters()), capture=Again):
        found, _ = passes(model, delta, batches(BEFORE + 2))
    assert Again.replays
    assert found == expected


def test_batches_of_a_step_add_up() -> None:
    """What an earlier batch left stands where the next one writes."""
    assert check(llama, LoRA(r=4), batches(BEFORE + 6), every=BEFORE + 6)
    assert check(llama, FullFineTuning(), batches(BEFORE + 6), every=3)


def test_batches_of_several_shapes_add_up() -> None:
    given = [b for pair in zip(batches(BEFORE + 3, 9), batches(BEFORE + 3, 14), strict=True) for b in pair]
    assert check(llama, LoRA(r=4), given, every=4)
    assert check(gpt2, FullFineTuning(), given, every=6)


@pytest.fixture
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks give their parameters their gradients."""

    def refused(self: Gradients, parameters: Any) -> Any:
        raise AssertionError("gradients are copied for autograd")

    monkeypatch.setattr(graphed_block, "MANY", 1)
    monkeypatch.setattr(Gradients, "copies", refused)


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize(
    "method", [LoRA(r=4), FullFineTuning(), BitFit(), PrefixTuning(num_virtual_tokens=3)], ids=repr
)
def test_a_block_of_many_parameters_gives_them_their_gradients(method: Method) -> None:
    """One pass a step, several, and of several shapes: nothing that stands there is written over."""
    assert check(llama, method, batches(BEFORE + 3))
    assert check(llama, method, batches(BEFORE + 6), every=3)
    given = [b for pair in zip(batches(BEFORE + 3, 9), batches(BEFORE + 3, 14), strict=True) for b in pair]
    assert check(llama, method, given, every=4)


def test_parameters_that_somebody_watches_get_theirs_from_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers that step within backward, say."""
    monkeypatch.setattr(graphed_block, "MANY", 1)
    model, delta = built(llama, LoRA(r=4))
    told = []
    for parameter in delta.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: told.append(p.grad.clone()))
    with graphed(model, delta.family, list(delta.parameters()), capture=Again):
        _, gradients = passes(model, delta, batches(BEFORE + 3))
    assert len(told) == len(gradients) == (BEFORE + 3) * len(list(delta.parameters()))


def test_shapes_take_turns_and_masks_are_read_anew() -> None:
    given = []
    for short, long in zip(batches(2 * BEFORE, 9), batches(2 * BEFORE, 14), strict=True):
        mask = torch.ones_like(long["labels"])
        mask[0, 14 - len(given) % 3 - 1 :] = 0
        given += [short, {**long, "attention_mask": mask}]
    assert check(llama, LoRA(r=4), given)


def test_validation_in_between_is_plain() -> None:
    model, delta = built(llama, LoRA(r=4))
    with graphed(model, delta.family, list(delta.parameters()), capture=Again):
        passes(model, delta, batches(BEFORE + 2))
        before = Again.replays
        with torch.no_grad():
            model(**batches(1)[0])
    assert Again.replays == before


def test_what_changes_from_batch_to_batch_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """A block that reads something besides its arguments cannot be captured: the graph has the old value."""
    box = {"shift": torch.zeros(())}

    class Stale(Again):
        def capture(self, function: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], None]]:
            then = box["shift"]

            def as_then() -> list[Any]:
                now, box["shift"] = box["shift"], then
                try:
                    return function()
                finally:
                    box["shift"] = now

            return super().capture(as_then)

    def run(record: bool) -> list[float]:
        model, delta = built(llama, LoRA(r=4))
        layer = model.get_submodule(delta.family.layers[2].path)
        layer.register_forward_hook(lambda _, __, y: y + box["shift"])
        losses = []
        blocks = graphed(model, delta.family, list(delta.parameters()), capture=Stale) if record else nullcontext()
        with blocks:
            for number, batch in enumerate(batches(BEFORE + 3)):
                box["shift"] = torch.tensor(0.1 * number)
                losses += passes(model, delta, [batch])[0]
        return losses

    with caplog.at_level(logging.WARNING, logger="spectune"):
        assert run(record=True) == run(record=False)
    assert "block 2 gives other results" in caplog.text


def test_a_failed_recording_says_so_and_runs_on(caplog: pytest.LogCaptureFixture) -> None:
    class Fails(Again):
        def capture(self, function: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], None]]:
            raise RuntimeError("operation not permitted when stream is capturing")

    model, delta = built(llama, LoRA(r=4))
    expected = passes(model, delta, batches(BEFORE + 2))[0]
    with graphed(model, delta.family, list(delta.parameters()), capture=Fails):
        assert passes(model, delta, batches(BEFORE + 2))[0] == expected
    assert "not permitted" in caplog.text


def test_graphs_are_for_small_steps() -> None:
    _, delta = built(llama, LoRA(r=4))
    assert launch_bound(delta.family, delta.method, tokens=1000, length=100)
    assert not launch_bound(delta.family, delta.method, tokens=10**10, length=100)


def decided(device_type: str, **settings: Any) -> bool:
    """Whether a run of this model on rows of 100 tokens captures its blocks."""
    config = TrainingConfig(**{"per_device_train_batch_size": 10, **settings})
    return decide(config, describe(llama()), LoRA(r=4), [100], device_type, steps=3).graphs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cuda_graphs": True}, "needs a CUDA device, the model is on 'cpu'"),
        ({}, None),
        ({"cuda_graphs": False, "packing": True, "gradient_checkpointing": True}, None),
    ],
)
def test_without_cuda(settings: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert decided("cpu", **settings) is False
    else:
        with pytest.raises(ConfigError, match=message):
            decided("cpu", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True}, "packing=false"),
        ({"gradient_checkpointing": "selective"}, "gradient_checkpointing=false"),
        ({}, None),
    ],
)
def test_on_cuda(settings: dict[str, Any], message: str | None) -> None:
    assert decided("cuda", **settings) is (message is None)
    if message is None:
        assert decided("cuda", cuda_graphs=True)
        assert not decided("cuda", per_device_train_batch_size=10**8)
    else:
        with pytest.raises(ConfigError, match=message):
            decided("cuda", cuda_graphs=True, **settings)


def test_rows_of_a_batch_with_a_delta_each_are_captured_by_route() -> None:
    """Batches of one shape whose rows have other deltas from pass to pass: none is replayed for another's rows."""

    def passed(capturing: bool) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(3)
        model: Any = llama().train()
        methods = [LoRA(r=2), BitFit(), IA3(), DoRA(r=3), PrefixTuning(num_virtual_tokens=2), PrefixTuning()]
        deltas = [attach(model, method, str(n), seed=n) for n, method in enumerate(methods)]
        for delta in deltas:
            move(delta)
        trained = [p for delta in deltas for p in delta.parameters()]
        ids = torch.arange(6 * 9).view(6, 9) % 60
        losses = []
        around = graphed(model, deltas[0].family, trained, capture=Again) if capturing else nullcontext()
        with around:
            for number in range(2 * (BEFORE + 3)):
                names = ["0", "1", None, "3", "4", "5"] if number % 2 else ["5", "2", "2", "0", "4", "4"]
                with route(model, names):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                losses.append(loss.item())
        return losses, [p.grad for p in trained]

    Again.replays = 0
    expected, found = passed(False), passed(True)
    assert Again.replays
    assert found[0] == expected[0]
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
