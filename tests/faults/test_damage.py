"""Damaged and hostile input: some cases of each kind here, all of them with `-m slow` and `benchmarks.reliability`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults import hostile_chats, hostile_rows, spoiled_bases, spoiled_deltas, spoiled_runs
from tests.faults.child import Forks
from tests.faults.kinds import Kind, judged

KINDS = [
    kind
    for module in (spoiled_bases, spoiled_deltas, spoiled_runs, hostile_rows, hostile_chats)
    for kind in module.KINDS
]
#: cases that `make test` has, on few bases and with few commands: what they share is made once
FAST = {
    "damaged-bases": (11, 23, 28, 34),
    "damaged-deltas": (0, 2),
    "damaged-runs": (44, 104, 213),
    "hostile-data": (0, 14, 28, 29, 41, 47),
    "hostile-templates": (1, 2, 4, 5, 8),
}
#: cases of a slow test: one that fails says which of so many it was
CHUNK = 50


def problems(kind: Kind, cases: Sequence[int], forks: Forks, root: Path) -> list[str]:
    found = []
    for index in cases:
        verdict, _ = judged(kind, forks, root, 0, index)
        if not verdict.held:
            found.append(f"{kind.name} 0 {index}: {'; '.join(verdict.problems)}: {verdict.what}")
    return found


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_damage_and_hostile_input_is_noticed_and_harms_nothing(kind: Kind, forks: Forks, shared_root: Path) -> None:
    assert problems(kind, FAST[kind.name], forks, shared_root) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "start"),
    [pytest.param(kind, start, id=f"{kind.name}-{start}") for kind in KINDS for start in range(0, kind.cases, CHUNK)],
)
def test_all_of_it(kind: Kind, start: int, forks: Forks, shared_root: Path) -> None:
    cases = range(start, min(start + CHUNK, kind.cases))
    assert problems(kind, cases, forks, shared_root) == []
