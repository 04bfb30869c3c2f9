"""One fork server, and one set of what all cases use, for all workers of pytest."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.child import Forks, server


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cases of all kinds run, and what they share is kept."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    (root / "faults").mkdir(exist_ok=True)
    return root / "faults"


@pytest.fixture(scope="session")
def forks(shared_root: Path) -> Iterator[Forks]:
    """A connection to the fork server that the first worker who asks starts; it goes with that worker, and whoever
    comes later starts the next."""
    address = shared_root / "address"
    with contextlib.ExitStack() as stack:
        with open(shared_root / "server.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                connected = Forks(address.read_text())
            except OSError:
                address.write_text(stack.enter_context(server()))
                connected = Forks(address.read_text())
        yield stack.enter_context(connected)
