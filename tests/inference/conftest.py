from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.support.sharp import model, tokenizer

from spectune.inference import Ticket, Written
from spectune.inference.cached_lane import CachedLane

__all__ = ["model", "tokenizer"]


@pytest.fixture
def prompt_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each pass over prompts has had, as they come."""
    together: list[int] = []
    enter = CachedLane.enter

    def noted(self: CachedLane, tickets: Sequence[Ticket]) -> list[Written]:
        together.append(len(tickets))
        return enter(self, tickets)

    monkeypatch.setattr(CachedLane, "enter", noted)
    return together
