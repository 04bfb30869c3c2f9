"""What is recorded serves any mixture of deltas, and is chosen where it pays. Recording itself is run again, as in
tests/blocks/test_recorded_steps.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.blocks.test_recorded_steps import Again
from tests.contract.conftest import move
from tests.contract.families import llama

from spectune.blocks import recorded_steps
from spectune.blocks.recorded_steps import PlainSteps, RecordedSteps
from spectune.blocks.step_blocks import Compiling
from spectune.deltas import Attachment, SlotTables, attach, detach, route
from spectune.families import describe
from spectune.inference.decode_batch import Caller
from spectune.inference.engine import Engine
from spectune.inference.request import Request
from spectune.inference.row_deltas import MOST_MIXTURES
from spectune.inference.step_choice import forms_of, steps_for
from spectune.methods import IA3, BitFit, BottleneckAdapter, DoRA, LoRA, PrefixTuning, PromptTuning
from spectune.methods.dora import DoRALayer

METHODS = {
    "lora": LoRA(r=4), "wide": LoRA(r=7), "dora": DoRA(r=4), "adapter": BottleneckAdapter(bottleneck_dim=4),
    "bitfit": BitFit(), "ia3": IA3(), "prefix": PrefixTuning(num_virtual_tokens=3),
    "prompt": PromptTuning(num_virtual_tokens=2),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = llama().eval()
    for name, method in METHODS.items():
        move(attach(made, method, name))
    return made


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_steps, "LEAST_CAPACITY", 4)


MIXTURES = ([None] * 3, [None, *METHODS, "lora", "prefix"], ["wide"] * 2, [None] * 3)


def written(engine: Engine, mixtures: Sequence[Sequence[str | None]] = MIXTURES) -> list[list[int]]:
    """One mixture after the other; rows enter late and end early."""
    found = []
    for deltas in mixtures:
        tickets = [
            engine.submit(Request([5 + number, 7, 9 + number % 3], 3 + 2 * (number % 4), delta))
            for number, delta in enumerate(deltas)
        ]
        while not engine.idle:
            for one in engine.step():
                assert one.error is None, one.error
        found += [ticket.ids for ticket in tickets]
    engine.close()
    return found


def recording(made: list[RecordedSteps], compiling: Compiling | None) -> Any:
    def steps(batch: Any) -> RecordedSteps:
        found = Attachment.of(batch.call.model)
        assert found is not None
        forms = forms_of(batch, found.family, compiling)
        capture: Any = Again
        made.append(RecordedSteps(batch.run, torch.float32, forms, costly=compiling is not None, capture=capture))
        return made[-1]

    return steps


def test_recorded_steps_serve_any_mixture(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = written(Engine(model, rows=4))
    made: list[RecordedSteps] = []
    with caplog.at_level(logging.WARNING, logger="spectune"):
        assert written(Engine(model, rows=4, steps=recording(made, None))) == expected
    assert "cannot be recorded" not in caplog.text
    [steps] = made
    mixed = {how for how, _, _ in steps.graphs if how != "bare"}
    assert all(kind == "tables" for kind, _ in mixed)
    kinds = {found for _, found in mixed}
    # a step of some kinds has nothing of others; and there are not as many of them as mixtures
    assert 2 <= len(kinds) <= MOST_MIXTURES + 1
    assert any(graph.trusted for (how, _, _), graph in steps.graphs.items() if how in mixed)


@pytest.mark.slow
def test_one_compiled_block_serves_any_mixture(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_steps, "LEAST_CAPACITY", 64)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    mixtures = ([*METHODS][:2], ["ia3", "prefix"], ["dora", None], ["lora"])
    expected = written(Engine(model, rows=2), mixtures)
    made: list[RecordedSteps] = []
    engine = Engine(model, rows=2, steps=recording(made, Compiling(backend=backend)))
    assert written(engine, mixtures) == expected
    assert len(made[0].forms) == 3, "a form was given up"
    # of one row and of two, anew with each kind that came to the tables; not for each of three layers, or each step
    assert len(graphs) <= 8


def test_a_route_over_tables_stands_in_no_generator(model: Any) -> None:
    """A compiled step would be compiled anew for each."""
    tables = SlotTables(model, 2)
    index = torch.tensor([tables.put("lora"), 0])
    with tables.routed(None, index, cached=True):
        assert tables.attachment.state._task.value.generator is None
    tables.take("lora")
    tables.close()


def test_what_is_recorded_is_forgotten_with_the_tables_it_reads(model: Any) -> None:
    made: list[RecordedSteps] = []
    engine = Engine(model, rows=2, steps=recording(made, None))

    def ids(name: str) -> list[int]:
        ticket = engine.submit(Request([5, 6, 7], 6, name))
        while not engine.idle:
            engine.step()
        return ticket.ids

    first = ids("lora")
    torch.manual_seed(5)
    move(attach(model, LoRA(r=16), "late"))
    assert ids("late") == list(_alone(model, "late"))
    detach(model, "late")
    assert ids("lora") == first
    engine.close()


def test_norms_of_a_delta_by_itself_are_taken_once_for_all_its_requests(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = list[object]()
    norms = DoRALayer.row_norms
    monkeypatch.setattr(DoRALayer, "row_norms", lambda self: (taken.append(self), norms(self))[1])
    engine = Engine(model, rows=2)
    for _ in range(2):
        tickets = [engine.submit(Request([5, 6, 7], 4, "dora")) for _ in range(2)]
        while not engine.idle:
            engine.step()
    layers = [m for _, m in Attachment.of(model).deltas["dora"].sites]  # type: ignore[union-attr]
    assert sorted(map(id, taken)) == sorted(map(id, layers))
    engine.close()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), route(model, "dora"):
        for token in tickets[0].ids:
            assert int(model(input_ids=ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_a_prompt_that_fails_leaves_its_delta_free(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, rows=1)
    move(attach(model, DoRA(r=2), "failing"))
    engine.submit(Request([5, 6, 7], 4, "failing"))
    monkeypatch.setattr(Caller, "read", lambda *_: 1 / 0)
    [one] = engine.step()
    assert isinstance(one.error, ZeroDivisionError)
    detach(model, "failing")
    engine.close()


def _alone(model: Any, name: str) -> list[int]:
    engine = Engine(model, rows=1)
    ticket = engine.submit(Request([5, 6, 7], 6, name))
    while not engine.idle:
        engine.step()
    engine.close()
    return ticket.ids


def test_plain_steps_off_the_device_and_where_few_are_to_come() -> None:
    tiny = llama()
    batch: Any = type("Batch", (), {"run": staticmethod(lambda rows, capacity: torch.zeros(rows, 3))})
    assert isinstance(steps_for(tiny, describe(tiny), 10**9)(batch), PlainSteps)
