"""What changes a model waits for the passes that run, and new ones wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from spectune.deltas import Attachment, attach
from spectune.deltas.running_passes import RunningPasses
from spectune.methods import LoRA
from tests.contract.families import llama

SECONDS = 10.0


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_change_waits_for_a_pass_and_the_next_pass_for_the_change() -> None:
    passes, order = RunningPasses(), list[str]()
    passing, go_on = threading.Event(), threading.Event()

    class Pass(torch.nn.Module):
        def forward(self) -> None:
            passes.begin()
            passes.begin()  # one inside of another
            passing.set()
            assert go_on.wait(SECONDS)
            order.append("pass")
            passes.end()
            passes.end()

    def change() -> None:
        with passes.none_running(), passes.none_running():
            order.append("change")

    def late_pass() -> None:
        passes.begin()
        order.append("late pass")
        passes.end()

    first = started(Pass())
    assert passing.wait(SECONDS)
    second = started(change)
    while passes._alone is None:
        pass
    third = started(late_pass)
    go_on.set()
    for thread in (first, second, third):
        thread.join(SECONDS)
    assert order == ["pass", "change", "late pass"]


def test_a_thread_that_changes_a_model_may_run_it() -> None:
    passes = RunningPasses()
    with passes.none_running():
        passes.begin()
        passes.end()
    passes.begin()
    with passes.none_running():
        pass
    passes.end()
    passes.end()  # one too many does no harm
    with passes.none_running():
        pass


def test_a_pass_that_ctrl_c_tore_is_not_waited_for() -> None:
    model = llama().eval()
    attach(model, LoRA(r=2))
    found = Attachment.of(model)
    assert found is not None
    torn, done = threading.Event(), threading.Event()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def work() -> None:
        handle = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(torch.zeros(1, 2, dtype=torch.int64))
        handle.remove()
        torn.set()
        done.wait(SECONDS)

    thread = started(work)
    assert torn.wait(SECONDS)
    with found.state.passes.none_running():
        done.set()
    thread.join(SECONDS)
