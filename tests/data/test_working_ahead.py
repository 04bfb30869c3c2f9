"""Work on one thing while the next is made: the order, errors and an early end are those of doing one after another."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from spectune.data.working_ahead import with_work_done


def numbers(count: int, made: list[int]) -> Iterator[int]:
    for number in range(count):
        made.append(number)
        yield number


def test_each_thing_comes_with_its_work_in_their_order() -> None:
    assert list(with_work_done(lambda number: number * number, range(50))) == [(n, n * n) for n in range(50)]


def test_nothing_comes_of_nothing() -> None:
    assert list(with_work_done(str, [])) == []


def test_an_error_of_the_work_is_raised_at_its_turn() -> None:
    def work(number: int) -> float:
        return 1 / (number - 3)

    worked = with_work_done(work, range(10))
    assert [next(worked)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(worked)


def test_an_error_of_what_makes_the_things_is_raised_and_no_thread_stays() -> None:
    def things() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(with_work_done(str, things()))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("spectune")]


def test_no_more_is_made_ahead_than_two_things() -> None:
    made: list[int] = []
    for number, _ in with_work_done(str, numbers(20, made)):
        assert len(made) <= number + 2


def test_who_stops_early_leaves_no_thread_behind() -> None:
    worked = with_work_done(str, range(1000))
    next(worked)
    worked.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("spectune")]
