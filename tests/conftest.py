"""What no test is about and all would wait for."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

# Python's collector looks at what tests make, not again and again at what a hundred thousand lines of imports and
# thousands of collected tests do: a single look would take longer than most tests
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What has processes of its own comes first: at the end one worker would wait for it."""
    items.sort(key=lambda item: item.path.name != "test_processes.py")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Whether a file outlives a power failure cannot be tested here; what is written when, and by which name, is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
