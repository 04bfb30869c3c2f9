"""A partial order with ties, from which pairs differ."""

from collections.abc import Mapping, Sequence

Pair = tuple[str, str]


def transitive(adjusted: Mapping[Pair, float], names: Sequence[str]) -> dict[Pair, float]:
    """Adjusted p-values that agree with each other: where a is better than b and b than c, a is better than c, at the
    weaker of the two p-values. It follows by logic, so that no error is added.

    Args:
        adjusted: for each (better, worse) pair of estimates.
        names: best first.
    """
    found = dict(adjusted)
    for middle in names:
        for a, b in found:
            if (a, middle) in found and (middle, b) in found:
                found[a, b] = min(found[a, b], max(found[a, middle], found[middle, b]))
    return found


def reduction(better: set[Pair]) -> set[Pair]:
    """The pairs of a transitive order that do not follow from the others: what a Hasse diagram draws."""
    names = {name for pair in better for name in pair}
    return {(a, b) for a, b in better if not any((a, c) in better and (c, b) in better for c in names)}


def groups(names: Sequence[str], differing: set[frozenset[str]]) -> list[list[str]]:
    """The maximal sets of names none of which differ, in the order of `names`; they may overlap.

    Bron and Kerbosch 1973, with a pivot.
    """
    alike = {a: {b for b in names if b != a and frozenset((a, b)) not in differing} for a in names}
    found: list[set[str]] = []

    def grow(members: set[str], candidates: set[str], done: set[str]) -> None:
        if not candidates and not done:
            found.append(members)
            return
        pivot = max(candidates | done, key=lambda name: len(alike[name] & candidates))
        for name in [n for n in names if n in candidates - alike[pivot]]:
            grow(members | {name}, candidates & alike[name], done & alike[name])
            candidates = candidates - {name}
            done = done | {name}

    if names:
        grow(set(), set(names), set())
    place = {name: index for index, name in enumerate(names)}
    return sorted((sorted(group, key=place.__getitem__) for group in found), key=lambda g: [place[n] for n in g])
