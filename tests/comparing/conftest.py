"""What tests of whole comparisons leave out."""

from __future__ import annotations

import pytest


@pytest.fixture
def short_measurements(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Few passages, one round of decoding; no page and no plots, except for tests marked by
    `with_reports`. What is left out here has tests of its own."""
    from spectune.comparing import measure

    monkeypatch.setattr(measure, "PASSAGES", 2)
    monkeypatch.setattr(measure, "PASSAGE_TOKENS", 8)
    monkeypatch.setattr(measure, "DECODE_TOKENS", 3)
    monkeypatch.setattr(measure, "ROUNDS", 1)
    if "with_reports" not in request.fixturenames:
        monkeypatch.setattr("spectune.comparing.comparison.write_reports", lambda content, folder: [])


@pytest.fixture
def with_reports() -> None:
    """For tests of what is made from `comparison.json`."""
