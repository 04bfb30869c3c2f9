"""Which of many cases every run of the tests has: the others are run by `make test-slow`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def others_slow(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """The cases for `pytest.mark.parametrize`; those that are not among `quick` are marked slow. Cases that are classes
    have their names as ids."""
    found = []
    for case in cases:
        name = case.__name__ if isinstance(case, type) else None
        found.append(pytest.param(case, id=name, marks=() if case in quick else pytest.mark.slow))
    return found
