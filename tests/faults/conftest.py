"""One fork server for all tests of faults, whichever worker of pytest runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.child import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks.started() as started:
        yield started


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cases of all kinds run, and what they share is kept."""
    return tmp_path_factory.mktemp("faults")
