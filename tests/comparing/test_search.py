"""Successive halving on functions whose best rate is known."""

from __future__ import annotations

import math

import pytest

from spectune.comparing.search import candidates, halving, successive_halving
from spectune.results.comparison_file import Trial

RUNGS = [(8, 10), (4, 20), (2, 40)]


def made(rate: float, steps: int, targets: int, loss: float | None, reason: str | None = None) -> Trial:
    return Trial(learning_rate=rate, steps=steps, target_tokens=targets, valid_loss=loss, reason=reason)


def bowl(best: float, diverges_from: float = math.inf):  # type: ignore[no-untyped-def]
    """Trials whose loss is lowest at a rate; longer ones are closer to it."""
    calls: list[tuple[float, int]] = []

    def trial(rate: float, steps: int) -> Trial:
        calls.append((rate, steps))
        if rate >= diverges_from:
            return made(rate, steps, steps * 100, None, "the loss is nan in step 3")
        return made(rate, steps, steps * 100, 1 + abs(math.log(rate / best)) + 1 / steps)

    return trial, calls


def test_candidates_are_even_on_a_log_scale() -> None:
    rates = candidates(1e-4, 1e-2, 5)
    assert rates == [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]
    assert candidates(1e-4, 1e-2, 1) == [1e-3]


def test_the_best_rate_is_found_with_the_budget_of_the_rungs() -> None:
    trial, calls = bowl(2e-3)
    found = successive_halving((1e-4, 1e-2), RUNGS, trial, source="a test")
    nearest = min(candidates(1e-4, 1e-2, 8), key=lambda rate: abs(math.log(rate / 2e-3)))
    assert found.best == nearest
    assert found.edge is None
    assert [steps for _, steps in calls] == [10] * 8 + [20] * 4 + [40] * 2
    assert f"best of 8 rates from 0.0001 to 0.01 (a test): {nearest:g}" in found.sentence


def test_each_rung_keeps_the_better_rates() -> None:
    trial, calls = bowl(1e-4)
    successive_halving((1e-4, 1e-2), RUNGS, trial, source="a test")
    rates = candidates(1e-4, 1e-2, 8)
    assert {rate for rate, steps in calls if steps == 20} == set(rates[:4])
    assert {rate for rate, steps in calls if steps == 40} == set(rates[:2])


def test_where_the_better_rates_diverge_in_longer_runs_the_next_ones_take_their_place() -> None:
    rates = candidates(1e-4, 1e-2, 8)

    def trial(rate: float, steps: int) -> Trial:
        failed = steps > 10 and rate >= rates[2]
        return made(rate, steps, 0, None if failed else 1 / rate, "the loss is nan" if failed else None)

    found = successive_halving((1e-4, 1e-2), RUNGS, trial, source="a test")
    assert found.best == rates[1]
    steps = [t.steps for t in found.trials]
    assert steps == [10] * 8 + [20] * 8 + [40] * 2

    def none(rate: float, steps: int) -> Trial:
        return made(rate, steps, 0, None if steps > 10 else 1.0)

    assert successive_halving((1e-4, 1e-2), RUNGS, none, source="a test").sentence.startswith("all of 8 rates")


@pytest.mark.parametrize(("best", "side"), [(1e-7, "low"), (10.0, "high")])
def test_a_best_rate_on_the_edge_is_told(best: float, side: str) -> None:
    found = successive_halving((1e-4, 1e-2), RUNGS, bowl(best)[0], source="a test")
    assert found.edge == side
    assert f"it is the {side}est tried" in found.sentence


def test_the_range_is_extended_as_long_as_that_helps() -> None:
    ratio = candidates(1e-4, 1e-2, 8)[1] / 1e-4
    trial, calls = bowl(1e-2 * ratio)
    found = successive_halving((1e-4, 1e-2), RUNGS, trial, source="a test", extensions=3)
    assert found.best == pytest.approx(1e-2 * ratio, rel=1e-2)
    assert found.edge is None  # one rate beyond the best was tried, and was worse
    assert [t.extension for t in found.trials].count(True) == 2
    assert [steps for _, steps in calls[-2:]] == [40, 40]
    assert "2 of them were tried because the best lay on the edge" in found.sentence


def test_an_extension_that_does_not_suffice_leaves_the_edge() -> None:
    found = successive_halving((1e-4, 1e-2), RUNGS, bowl(10.0)[0], source="a test", extensions=2)
    assert found.edge == "high"
    assert len(found.trials) == 8 + 4 + 2 + 2


def test_rates_that_diverge_are_no_edge_and_go_no_further() -> None:
    trial, calls = bowl(10.0, diverges_from=5e-3)
    found = successive_halving((1e-4, 1e-2), RUNGS, trial, source="a test", extensions=2)
    assert found.best is not None
    assert found.best < 5e-3
    assert found.edge is None
    assert all(rate < 5e-3 for rate, steps in calls if steps > 10)


def test_where_all_diverge_lower_rates_are_tried() -> None:
    found = successive_halving(
        (1e-2, 3e-2), [(2, 40)], bowl(4e-3, diverges_from=9e-3)[0], source="a test", extensions=3
    )
    assert found.best == pytest.approx(1e-2 / 3, rel=1e-2)
    assert found.edge is None  # it went on to a third of that, which was worse
    assert "because all others diverged" in found.sentence


def test_where_all_diverge_there_is_no_best() -> None:
    found = successive_halving((1e-4, 1e-2), RUNGS, bowl(1.0, diverges_from=0)[0], source="a test", extensions=2)
    assert found.best is None
    assert len(found.trials) == 8 + 2
    assert "all of" in found.sentence
    assert found.to_dict()["trials"][0]["reason"] == "the loss is nan in step 3"


def test_searches_that_take_their_trials_in_one_go_find_what_each_finds_alone() -> None:
    bowls = [bowl(3e-4), bowl(10.0), bowl(1.0, diverges_from=3e-3)]
    alone = [successive_halving((1e-4, 1e-2), RUNGS, trial, source="a test", extensions=2) for trial, _ in bowls]
    searches = [halving((1e-4, 1e-2), RUNGS, source="a test", extensions=2) for _ in bowls]
    wanted, found = {n: next(search) for n, search in enumerate(searches)}, {}
    while wanted:
        made = {n: [bowls[n][0](*one) for one in ask] for n, ask in wanted.items()}
        wanted = {}
        for n, trials in made.items():
            try:
                wanted[n] = searches[n].send(trials)
            except StopIteration as end:
                found[n] = end.value
    assert [found[n] for n in range(len(bowls))] == alone
