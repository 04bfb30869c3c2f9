"""A run that has ended, its delta detached, leaves no tensor behind."""

from __future__ import annotations

import contextlib
import gc
import io
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import spectune
from spectune.blocks.cuda_graphs import graphed
from spectune.deltas import Method
from spectune.objectives import CAUSAL_LM
from spectune.training import TrainingConfig
from tests.support import make_model, make_rows, make_tokenizer
from tests.training.test_compiling import built, gpt2
from tests.training.test_graphs import BEFORE, Again, batches

RUNS = 2
LINES = Console(file=io.StringIO())


def live() -> dict[int, tuple[int, str]]:
    """The memory of all tensors that Python knows: address -> its bytes, and what stands there."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # by type, not by isinstance: the compiler's stand-ins for tensors have no memory
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout is torch.strided:
            with contextlib.suppress(RuntimeError):  # nor has one whose storage other tests have taken away
                storage = thing.untyped_storage()
                if thing.device.type == "cpu" and storage.nbytes():
                    found[storage.data_ptr()] = storage.nbytes(), f"{tuple(thing.shape)} {thing.dtype}"
    return found


def left_since(before: dict[int, tuple[int, str]]) -> list[tuple[int, str]]:
    return [what for address, what in live().items() if address not in before]


@pytest.fixture(scope="module")
def base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return make_model(), make_tokenizer()


#: the base itself, modules at outputs, and what is put into attention; the others with -m slow
KINDS = (spectune.FullFineTuning, spectune.PrefixTuning, spectune.LoRA)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            method,
            id=str(method.model_fields["name"].default),
            marks=[] if method in KINDS else pytest.mark.slow,
        )
        for method in spectune.METHODS
    ],
)
def test_a_run_that_has_ended_leaves_no_tensor_behind(base: Any, method: type[Method]) -> None:
    model, tokenizer = base
    rows = make_rows(12)
    # plans are made of one method's runs: they are the same code, and take longer than the runs
    check: Any = "refuse" if method is spectune.LoRA else "off"
    config = TrainingConfig(max_steps=2, per_device_train_batch_size=4, learning_rate=1e-4, memory_check=check)
    before = live()

    for _ in range(RUNS):
        delta = spectune.attach(model, method(), keep_base=method.trains_base)
        spectune.train(model, tokenizer, delta, rows[:8], rows[8:], config, console=LINES)
        spectune.detach(model, delta.name)
    del delta
    assert left_since(before) == []


@pytest.mark.parametrize("method", [spectune.LoRA, pytest.param(spectune.PrefixTuning, marks=pytest.mark.slow)])
def test_blocks_that_were_recorded_leave_no_tensor_behind(method: type[Method]) -> None:
    before = live()
    model, delta = built(gpt2, method())
    with graphed(model, delta.family, list(delta.parameters()), capture=Again):  # type: ignore[arg-type]
        for batch in batches(BEFORE + 2):
            CAUSAL_LM.loss_sum(model, batch)[0].backward()
    del model, delta, batch

    assert Again.replays > 0
    assert left_since(before) == []
