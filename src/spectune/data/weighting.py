"""Training rows as often as the weights of their sources say."""

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from spectune.data.data_report import DataReport, SourceReport
from spectune.data.encoding import Encoded
from spectune.data.example import Example
from spectune.errors import DataError


def weighted(encoded: Encoded, weights: Mapping[str, float], seed: int) -> Encoded:
    """Training rows as often as their sources' weights say, and a report that says how many an epoch has of each.

    Which rows of a fraction are drawn follows from the seed and the source's name alone. A long text, which is several
    examples, is drawn or left out whole.

    Args:
        weights: by the name of the source; rows of others are taken once.

    Raises:
        DataError: a weight is so small that no row of its source is left.
    """
    if not weights:
        return encoded
    rows = defaultdict[str | None, dict[int, list[Example]]](dict)
    for example in encoded.examples:
        rows[example.row.source].setdefault(id(example.row), []).append(example)
    found = list[Example]()
    # one of which no row is left (held out, dropped) has none in an epoch, and the report says so
    known = encoded.report.sources
    sources = {name: replace(known.get(name, SourceReport()), weight=weight) for name, weight in weights.items()}
    for name, of_source in rows.items():
        weight, groups = weights.get(name or "", 1.0), list(of_source.values())
        taken = _drawn(groups, weight, f"{seed}-{name}")
        if not taken:
            raise DataError(
                f"data {name}: weight = {weight:g} leaves none of its {len(groups):,} rows; expected more, "
                f"such as {1 / len(groups):.3g} for one row, or no such source"
            )
        examples = [example for group in taken for example in group]
        found += examples
        if name in sources:
            sources[name] = sources[name].with_epoch(examples)
    return Encoded(found, replace(encoded.report, sources=sources))


def _drawn(groups: list[list[Example]], weight: float, seed: str) -> list[list[Example]]:
    """All of the groups as often as the whole part of the weight says, and a seeded share of them once more."""
    whole, part = divmod(weight, 1)
    drawn = random.Random(seed).sample(range(len(groups)), round(part * len(groups)))
    return [*groups * int(whole), *(groups[place] for place in sorted(drawn))]


def mixture(report: DataReport) -> str:
    """`54 rows of a (x 0.5), 36 of b (x 2): 99 examples an epoch`; "" where nothing was weighted."""
    mixed = {name: found for name, found in report.sources.items() if found.weight is not None}
    parts = [
        f"{found.rows:,}{' rows' if place == 0 else ''} of {name}"
        + (f" (x {found.weight:g})" if found.weight != 1 else "")
        for place, (name, found) in enumerate(mixed.items())
    ]
    examples = sum(found.epoch_examples for found in mixed.values())
    return f"{', '.join(parts)}: {examples:,} examples an epoch" if parts else ""
