"""The sweeps that the rate rules are fitted to: which rates are tried, and what the page makes of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from benchmarks.rates.page import HIDDEN, loss_between
from benchmarks.rates.sweep import MOST, Arm, records

from spectune.methods import BY_NAME

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "rates.jsonl"


def tried(best: float, diverges_from: float = math.inf) -> Arm:
    """An arm whose loss is lowest at a rate, run until it wants nothing more."""
    arm = Arm("base", "lora", 1e-2)
    while (k := arm.wanted()) is not None:
        rate = arm.rate(k)
        arm.losses[k] = math.inf if rate >= diverges_from else abs(math.log(rate / best))
    return arm


@pytest.mark.parametrize("best", [1e-2, 7e-3, 6e-2, 4e-4])
def test_a_sweep_ends_with_worse_rates_close_on_both_sides_of_the_best(best: float) -> None:
    arm = tried(best)
    lowest = min(arm.losses, key=lambda k: arm.losses[k])
    assert {lowest - 1, lowest + 1} <= set(arm.losses)
    assert len(arm.losses) <= MOST
    assert abs(math.log(arm.rate(lowest) / best)) <= math.log(3) / 4 + 0.01


def test_where_all_diverge_a_sweep_goes_down() -> None:
    arm = tried(1e-3, diverges_from=1.1e-3)
    assert min(arm.losses.values()) < 1
    assert len(arm.losses) <= MOST


def test_what_runs_is_not_asked_for_again() -> None:
    arm = Arm("base", "lora", 1e-2)
    for _ in range(3):
        k = arm.wanted()
        assert k is not None
        arm.flying.add(k)
    assert arm.wanted() is None  # the edge is known when these have ended


def test_the_loss_at_the_default_lies_between_its_neighbours() -> None:
    ended = [(1e-3, 2.0), (1e-2, 1.0), (1e-1, 3.0)]
    assert loss_between(ended, 1e-2) == 1.0
    assert loss_between(ended, math.sqrt(1e-1 * 1e-2)) == pytest.approx(2.0)
    assert loss_between(ended, 1.0) is None


#: methods that the bases made for the sweeps were not there for any more
ON_TWO_BASES = ("oft", "miss", "ln")


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "dora"])  # DoRA has LoRA's rule
def test_on_every_base_that_was_swept_the_default_is_near_the_best(name: str) -> None:
    found = records(RESULTS)
    hidden = HIDDEN | {r["base"]: r["hidden"] for r in found if r["kind"] == "pretrain"}
    runs = [r for r in found if r["kind"] == "run" and r["method"] == name]
    assert set(hidden) == {"spectune-tiny", "gpt2-27m", "gpt2-60m", "llama-120m"}
    if name in ON_TWO_BASES:
        hidden = HIDDEN
    assert {r["base"] for r in runs} == set(hidden)
    for base, width in hidden.items():
        ended = sorted((r["rate"], r["valid_loss"]) for r in runs if r["base"] == base and r["valid_loss"] is not None)
        best, lowest = min(ended, key=lambda run: run[1])
        base_loss = next(r["base_loss"] for r in runs if r["base"] == base)
        default = BY_NAME[name].learning_rates.at(width).rate
        assert best / 3 <= default <= best * 3
        loss = loss_between(ended, default)
        assert loss is not None
        assert loss - lowest <= 0.02 * (base_loss - lowest)
