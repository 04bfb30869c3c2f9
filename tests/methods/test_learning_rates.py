"""A method's default learning rate, and where a search looks for it, follow from the base's size."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from transformers import LlamaConfig

from spectune.comparing.schedule import QUICK
from spectune.deltas.rate_rule import BaseRate, RatePoint, RateRule
from spectune.families import family_from_config
from spectune.methods import METHODS, BitFit, FullFineTuning, LoRA
from spectune.storage.bases import load_config

#: hidden size of a Llama -> the best LoRA rate of Tinker's sweeps on Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B
PUBLISHED = {2048: 1e-3, 4096: 3e-4, 8192: 3e-4}
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: str(m.model_fields["name"].default))


def of_llama(method: type[Any], hidden: int) -> BaseRate:
    """From the config alone; the number of layers does not count."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=64, num_hidden_layers=1, num_attention_heads=hidden // 128
    )
    found: BaseRate = method.learning_rates.at(family_from_config(config).hidden_size)
    return found


@pytest.mark.parametrize(("hidden", "best"), PUBLISHED.items())
def test_loras_default_is_within_a_factor_2_of_the_published_best_of_llama(hidden: int, best: float) -> None:
    found = of_llama(LoRA, hidden)
    assert best / 2 <= found.rate <= best * 2
    assert found.strong
    full = of_llama(FullFineTuning, hidden)
    assert full.rate == pytest.approx(found.rate / 10, rel=0.05)


@pytest.mark.parametrize(("hidden", "best"), PUBLISHED.items())
def test_quicks_first_rates_lie_on_both_sides_of_the_published_best(hidden: int, best: float) -> None:
    assert QUICK.around_default is not None
    for method, published in ((LoRA, best), (FullFineTuning, best / 10)):
        low, high = of_llama(method, hidden).around(QUICK.around_default)
        assert low < published < high
        assert high / low == pytest.approx(QUICK.around_default)


@every_method
def test_a_search_looks_on_both_sides_of_the_default_on_every_base(method: type[Any]) -> None:
    for hidden in (64, load_config("spectune-tiny").hidden_size, 448, 640, 768, 896, 1600, *PUBLISHED, 16384):
        found = method.learning_rates.at(hidden)
        low, high = found.search_range
        first, second = found.around(3.0)
        assert low < first < found.rate < second < high
        assert high / low > 99  # the families of one size differ by 3, tasks by 6


@every_method
def test_points_rise_in_size_and_say_where_they_are_from(method: type[Any]) -> None:
    points = method.learning_rates.points
    assert all(a.hidden < b.hidden for a, b in itertools.pairwise(points))
    assert all(point.source and point.rate > 0 for point in points)
    assert points[0].strong
    assert points[-1].hidden >= 4096  # what is published, not a guess from small bases


@every_method
def test_wide_bases_take_no_more_than_narrow_ones(method: type[Any]) -> None:
    rates = [method.learning_rates.at(hidden).rate for hidden in (896, 2048, 3072, 4096, 8192)]
    assert rates == sorted(rates, reverse=True)


def test_between_two_points_the_rate_is_a_power_of_the_size_and_outside_it_is_level() -> None:
    rule = RateRule((RatePoint(100, 1e-2, "one"), RatePoint(10_000, 1e-4, "another", strong=False)))
    assert [rule.at(hidden).rate for hidden in (10, 100, 1000, 10_000, 99_999)] == [1e-2, 1e-2, 1e-3, 1e-4, 1e-4]
    assert [rule.at(hidden).source for hidden in (10, 1000, 10_000)] == ["one", "one and another", "another"]
    assert [rule.at(hidden).strong for hidden in (100, 101, 10_000)] == [True, False, False]


def test_the_rule_is_said_with_size_source_and_strength() -> None:
    assert LoRA.learning_rates.at(4096).sentence == (
        "by rule for hidden size 4,096, from Tinker's sweeps of Llama 1B, 8B and 70B; strong evidence"
    )
    assert BitFit.learning_rates.at(4096).sentence.endswith("; weak evidence")
