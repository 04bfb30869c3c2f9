"""Batches that are filled up to few shapes teach what they taught before."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from spectune.blocks.execution import Execution, Packing
from spectune.data import Example, Row
from spectune.deltas import Method, route
from spectune.methods import METHODS
from spectune.objectives import CAUSAL_LM
from spectune.training import TrainingConfig
from spectune.training.batch_shapes import MOST, _fewest, batch_shapes
from spectune.training.distribution import World
from spectune.training.prediction import shape_of
from spectune.training.step_batches import Batches
from tests.training.test_compiling import built, gpt2, llama, undropped


def rows(count: int, longest: int = 12) -> list[Example]:
    draw = random.Random(4)
    lengths = [longest, *(draw.randrange(4, longest) for _ in range(count - 1))]
    return [Example([draw.randrange(1, 60) for _ in range(n)], 2, Row("test", text="")) for n in lengths]


def test_the_lengths_are_those_that_cost_least() -> None:
    draw = random.Random(0)
    for count in (1, 2, 3, 4):
        longest = Counter(draw.randrange(5, 30) for _ in range(40))
        sizes = sorted(longest)
        chosen, places = _fewest(longest, count)
        expected = min(
            sum(
                number * min(size for size in (*some, sizes[-1]) if size >= length)
                for length, number in longest.items()
            )
            for some in itertools.combinations(sizes, count - 1)
        )
        assert places == expected
        assert len(chosen) <= count
        assert chosen[-1] == sizes[-1]


def test_no_more_lengths_than_pay_and_the_cost_is_stated() -> None:
    config = TrainingConfig(per_device_train_batch_size=4)
    alike = batch_shapes([50] * 10, config)
    assert (alike.lengths, alike.rows) == ((50,), 4)
    assert alike.cost == pytest.approx(12 / 10 - 1)  # the epoch's last batch is filled up to four rows
    unlike = batch_shapes([random.Random(n).randrange(5, 200) for n in range(400)], config)
    assert 1 < len(unlike.lengths) <= MOST
    assert 0 < unlike.cost < 0.3
    assert batch_shapes([7, 9], config).rows == 2


def test_shapes_are_the_same_whatever_the_seed() -> None:
    lengths = [random.Random(n).randrange(5, 200) for n in range(400)]
    first, second = (batch_shapes(lengths, TrainingConfig(seed=seed)) for seed in (0, 7))
    assert first == second


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("method", METHODS)
def test_what_fills_a_batch_changes_neither_loss_nor_gradient(make: Any, method: type[Method], masked: bool) -> None:
    model, delta = built(make, undropped(method))
    examples, config = rows(3), TrainingConfig(per_device_train_batch_size=4)
    found = []
    for packing in (Packing(mask_free=not masked), Packing(mask_free=not masked, lengths=(9, 15), rows=4)):
        batches = Batches(examples, config, packing, World())
        batch = batches.collate([[0], [1], [2]])
        assert tuple(batch["input_ids"].shape) == ((4, 15) if packing.lengths else (3, 12))
        assert ("attention_mask" in batch) is masked
        with route(model, delta.name):
            loss, targets = CAUSAL_LM.loss_sum(model, batch)
        loss.backward()
        found.append((loss.item(), targets, [p.grad for p in delta.parameters()]))
        for parameter in delta.parameters():
            parameter.grad = None
    (loss, targets, gradients), (filled_loss, filled_targets, filled_gradients) = found
    assert targets == filled_targets
    assert filled_loss == pytest.approx(loss, rel=1e-5)
    for one, other in zip(gradients, filled_gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_the_plan_is_of_the_filled_batch() -> None:
    packs = [[example] for example in rows(3)]
    packing = Packing(lengths=(9, 15), rows=4)
    found = shape_of(packs, packing)
    assert (found.rows, found.length, found.padded) == (4, 15, True)
    assert found.all_targets == shape_of(packs).all_targets
    assert not shape_of(packs, replace(packing, mask_free=True)).padded


def test_without_graphs_no_batch_is_filled_up() -> None:
    filled = Packing(lengths=(9, 15), rows=4)
    execution = Execution(graphs=True, packing=filled).because("cuda_graphs", "blocks are captured")
    leaner = execution.recomputing("selective")
    assert not leaner.graphs
    assert leaner.packing == Packing()
    assert leaner.reason("cuda_graphs") is None
    assert execution.recomputing(False).packing == filled
