"""Seconds by phase add up to the time that has passed, whatever is nested, apart or taken over from before."""

from __future__ import annotations

import pytest

from spectune.phases import Phases


class Clock:
    """A clock that tests wind."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def fails_after(self, seconds: float) -> None:
        self.now += seconds
        raise ValueError("no")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_time_is_of_the_innermost_phase_and_the_sum_is_what_has_passed(clock: Clock) -> None:
    phases = Phases(clock)
    clock.now += 1
    with phases.of("steps"):
        clock.now += 10
        with phases.of("validation"):
            clock.now += 3
            with phases.of("save"):
                clock.now += 0.5
        clock.now += 7
    clock.now += 2
    assert phases.record() == {"steps": 17, "validation": 3, "save": 0.5, "other": 3}
    assert sum(phases.record().values()) == clock.now - 100


def test_a_phase_that_fails_has_its_time(clock: Clock) -> None:
    phases = Phases(clock)
    with pytest.raises(ValueError, match="no"), phases.of("plan"):
        clock.fails_after(4)
    clock.now += 1
    assert phases.record() == {"plan": 4, "other": 1}


def test_what_a_part_records_by_itself_is_counted_there_and_the_rest_here(clock: Clock) -> None:
    phases = Phases(clock)
    with phases.of("judge"):
        clock.now += 1
        with phases.apart() as part:
            with part.of("steps"):
                clock.now += 20
            clock.now += 2
            own = part.record()
            clock.now += 0.25  # writing what was recorded
    assert own == {"steps": 20, "other": 2}
    assert phases.record() == {"judge": 1.25}


def test_a_part_that_fails_before_it_records_is_counted_here(clock: Clock) -> None:
    phases = Phases(clock)
    with pytest.raises(ValueError, match="no"), phases.apart() as part, part.of("steps"):
        clock.fails_after(5)
    assert phases.record() == {"other": 5}


def test_a_run_that_goes_on_adds_to_what_it_took_before(clock: Clock) -> None:
    before = Phases(clock)
    with before.of("steps"):
        clock.now += 5
    again = Phases(clock)
    again.add(before.record())
    with again.of("steps"):
        clock.now += 2
    assert again.record() == {"steps": 7}


def test_compiling_happens_within_steps_and_is_told_apart(clock: Clock) -> None:
    phases = Phases(clock)
    with phases.of("steps"):
        clock.now += 30
    phases.move(12, "steps", "compile")
    phases.move(50, "save", "compile")
    assert phases.record() == {"compile": 12, "steps": 18}
