"""Steps are made before the first request, and none is made in the middle of an answer. Recording itself is run again,
as in tests/blocks/test_recorded_steps.py."""

from __future__ import annotations

import importlib
from typing import Any, cast

import pytest
import torch
from tests.blocks.test_recorded_steps import Again
from tests.contract.conftest import move
from tests.contract.families import llama

from spectune.blocks import recorded_steps
from spectune.blocks.recorded_steps import RecordedSteps
from spectune.deltas import Attachment, attach
from spectune.inference import Engine, Request, warm_up
from spectune.inference.engine_bases import family_of
from spectune.inference.step_choice import forms_of
from spectune.methods import IA3, LoRA, PrefixTuning, PromptTuning

METHODS = {
    "lora": LoRA(r=4), "narrow": LoRA(r=2), "ia3": IA3(), "prefix": PrefixTuning(num_virtual_tokens=3),
    "prompt": PromptTuning(num_virtual_tokens=2),
}  # fmt: skip
MIXTURES = ([None] * 3, ["lora", "narrow", None], ["ia3"], ["prefix", "prompt"], ["ia3", "narrow", "prompt", "lora"])


def recording(made: list[RecordedSteps]) -> Any:
    def steps(batch: Any) -> RecordedSteps:
        forms, capture = forms_of(batch, family_of(batch.call.model), None), cast(Any, Again)
        made.append(RecordedSteps(batch.run, torch.float32, forms, costly=True, capture=capture))
        return made[-1]

    return steps


def written(engine: Engine, new: int = 5) -> list[list[int]]:
    found = []
    for deltas in MIXTURES:
        tickets = [engine.submit(Request([5 + n, 7, 9], new, delta)) for n, delta in enumerate(deltas)]
        while not engine.idle:
            for one in engine.step():
                assert one.error is None, one.error
        found += [ticket.ids for ticket in tickets]
    return found


def test_a_warm_engine_makes_no_step_for_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    of_module: Any = importlib.import_module("spectune.inference.warming")
    for module, name, value in (
        (recorded_steps, "LEAST_CAPACITY", 8), (of_module, "LEAST_CAPACITY", 8), (of_module, "_PLACES", 32),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    torch.manual_seed(0)
    model: Any = llama().eval()
    for name, method in METHODS.items():
        move(attach(model, method, name))
    plain = Engine(model, rows=4)
    expected = written(plain)
    plain.close()
    made: list[RecordedSteps] = []
    engine = Engine(model, rows=4, steps=recording(made))
    warm_up(engine, ["lora", "ia3", "prefix", "prompt"])
    [steps] = made
    before = list(steps.graphs)
    # of the bare base, of LoRA alone, of both kinds that are computed; of 1, 2 and 4 rows, over two capacities
    assert len(before) == 3 * 3 * 2
    assert all(graph.trusted for graph in steps.graphs.values())
    assert written(engine) == expected
    assert set(steps.graphs) == set(before)
    # texts that grow do not make the cache anew
    assert [len(ids) for ids in written(engine, 16)] == [16] * 13
    assert set(before) < set(steps.graphs)


@pytest.mark.parametrize(("room", "slots"), [(None, 8), (6, 6), (1, 4)])
def test_tables_are_made_for_as_many_deltas_as_memory_is_given_for(room: int | None, slots: int) -> None:
    """For each row one, where there is room; and a few in any case."""
    model: Any = llama().eval()
    delta = attach(model, LoRA(r=4), "lora")
    one = sum(p.numel() for p in delta.parameters()) * 4
    made: list[RecordedSteps] = []
    engine = Engine(model, rows=8, steps=recording(made))
    warm_up(engine, ["lora"], table_bytes=None if room is None else room * one)
    [tables] = Attachment.of(model).state.tables  # type: ignore[union-attr]
    assert tables.slots == slots  # type: ignore[attr-defined]


def test_a_base_of_few_positions_is_warmed_up_as_far_as_it_goes() -> None:
    model: Any = llama().eval()  # of 64
    made: list[RecordedSteps] = []
    engine = Engine(model, rows=2, steps=recording(made))
    warm_up(engine, [])
    assert [key[1:] for key in made[0].graphs] == [(1, 128), (2, 128)]
    assert engine.idle


def test_what_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = llama().eval()
    engine = Engine(model, rows=2)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel")))
    with pytest.raises(RuntimeError, match="no kernel"):
        warm_up(engine, [])
