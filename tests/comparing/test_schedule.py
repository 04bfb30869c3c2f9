"""The budget of a comparison: equal for all methods, in steps."""

from __future__ import annotations

import pytest

from spectune.comparing.budget import Budget, duration
from spectune.comparing.schedule import DEFAULT, PRESETS, QUICK, Schedule, planned_rows
from spectune.errors import ConfigError
from spectune.training import TrainingConfig

SETTINGS = TrainingConfig(max_steps=160, per_device_train_batch_size=4, gradient_accumulation_steps=2, seed=7)


def test_quick_is_three_rates_at_an_eighth_and_one_seed() -> None:
    schedule = Schedule.of(QUICK, SETTINGS, rows=1000, target_tokens=20_000)
    assert schedule.planned_trials == ((3, 20),)
    assert schedule.seeds == (7,)
    assert not schedule.record(100).covers_training_noise
    assert schedule.target_tokens_per_step == 20 * 8
    assert schedule.record(100).search_target_tokens == 3 * 20 * 160


def test_the_default_searches_eight_rates_and_repeats_three_times() -> None:
    schedule = Schedule.of(DEFAULT, SETTINGS, rows=1000, target_tokens=20_000)
    assert schedule.rungs == ((8, 10), (4, 20), (2, 40))
    assert schedule.seeds == (7, 8, 9)
    assert sum(steps for _, steps in schedule.pieces("lora")) == 80 + 80 + 80 + 3 * 160


@pytest.mark.parametrize(("steps", "rungs"), [(1, ((8, 1),)), (6, ((8, 1), (2, 2))), (16, ((8, 1), (4, 2), (2, 4)))])
def test_no_rung_repeats_the_one_before(steps: int, rungs: tuple[tuple[int, int], ...]) -> None:
    short = SETTINGS.model_copy(update={"max_steps": steps})
    assert Schedule.of(DEFAULT, short, rows=1000, target_tokens=20_000).rungs == rungs


def test_a_given_rate_is_not_searched_for() -> None:
    fixed = SETTINGS.model_copy(update={"learning_rate": 1e-3})
    for preset in PRESETS.values():
        assert Schedule.of(preset, fixed, rows=1000, target_tokens=20_000).rungs == ()


def test_a_curve_never_takes_more_steps_than_a_final_run() -> None:
    schedule = Schedule.of(QUICK, SETTINGS, 1000, 20_000, fractions=[16, 0.1, 0.5, 1])
    assert schedule.curve == ((16, 40), (100, 160), (500, 160), (1000, 160))
    assert schedule.curve_seeds == (7,)


def test_planned_rows() -> None:
    assert planned_rows([0.1, 100, 1], 2000) == [100, 200, 2000]
    assert planned_rows([1e-9], 2000) == [1]
    with pytest.raises(ConfigError, match=r"fractions 5,000: there are 2,000 training rows; 1 is all of them"):
        planned_rows([0.1, 5000], 2000)


def test_the_time_left_follows_each_methods_own_pace() -> None:
    budget = Budget([("full", 100), ("full", 100), ("lora", 100)], step_seconds=0.5)
    assert budget.seconds_left() == 150
    budget.ended("full", 100, 200.0)
    assert budget.seconds_left() == pytest.approx(100 * 2 + 100 * 2)  # nothing is known of LoRA yet
    budget.ended("lora", 50, 25.0)  # an extension
    assert budget.total_steps == 350
    assert budget.seconds_left() == pytest.approx(100 * 2 + 100 * 0.5)
    assert str(budget) == "43% of the budget done, about 4 min left"
    budget.drop("full")
    assert budget.seconds_left() == pytest.approx(50)
    budget.ended("lora", 100, None)
    assert str(budget) == "100% of the budget done"


def test_durations() -> None:
    assert [duration(s) for s in (0.2, 35, 240, 7800)] == ["1 s", "35 s", "4 min", "2 h 10 min"]
