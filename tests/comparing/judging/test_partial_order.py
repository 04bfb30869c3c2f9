"""The partial order, on any p-values: hypothesis looks for a counterexample."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from spectune.comparing.judging.partial_order import groups, reduction, transitive

NAMES = list("abcdefg")


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[str], dict[tuple[str, str], float]]:
    """Names, best first, and a p-value for each pair."""
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    return names, {pair: draw(st.floats(0, 1)) for pair in combinations(names, 2)}


def closure(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    found = set(pairs)
    while True:
        more = found | {(a, d) for a, b in found for c, d in found if b == c}
        if more == found:
            return found
        found = more


@given(cases())
@settings(deadline=None)
def test_differences_are_a_strict_partial_order(case: tuple[list[str], dict[tuple[str, str], float]]) -> None:
    names, p = case
    adjusted = transitive(p, names)
    assert all(adjusted[pair] <= p[pair] for pair in p)
    for level in (0.0, 0.01, 0.05, 0.5):
        better = {pair for pair, value in adjusted.items() if value <= level}
        assert closure(better) == better
        assert not any((b, a) in better for a, b in better)
        # nothing is added but what follows from the pairs that differ by themselves
        assert better == closure({pair for pair, value in p.items() if value <= level})


@given(cases(), st.floats(0, 1))
@settings(deadline=None)
def test_reduction_says_the_same_with_the_fewest_pairs(
    case: tuple[list[str], dict[tuple[str, str], float]], level: float
) -> None:
    names, p = case
    better = {pair for pair, value in transitive(p, names).items() if value <= level}
    kept = reduction(better)
    assert closure(kept) == better
    assert all(closure(kept - {pair}) != better for pair in kept)


@given(cases(), st.floats(0, 1))
@settings(deadline=None)
def test_groups_are_the_maximal_cliques_of_what_does_not_differ(
    case: tuple[list[str], dict[tuple[str, str], float]], level: float
) -> None:
    names, p = case
    differing = {frozenset(pair) for pair, value in p.items() if value <= level}

    def alike(members: tuple[str, ...]) -> bool:
        return not any(frozenset(pair) in differing for pair in combinations(members, 2))

    every = [set(m) for size in range(1, len(names) + 1) for m in combinations(names, size) if alike(m)]
    wanted = [group for group in every if not any(group < other for other in every)]
    found = groups(names, differing)
    assert sorted(map(sorted, found)) == sorted(map(sorted, wanted))
    assert all(group == sorted(group, key=names.index) for group in found)


def test_no_names_no_groups() -> None:
    assert groups([], set()) == []
    assert reduction(set()) == set()
