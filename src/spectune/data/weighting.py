"""Training rows as often as the weights of their sources say."""

import random
from collections import defaultdict
from collections.abc import Mapping

from spectune.data.encoding import Encoded
from spectune.data.example import Example


def weighted(encoded: Encoded, weights: Mapping[str, float], seed: int) -> Encoded:
    """Training rows as often as their sources' weights say; the rows of a fraction are drawn with the seed.

    Args:
        weights: by the name of the source; rows of others are taken once.
    """
    if all(weight == 1 for weight in weights.values()):
        return encoded
    rows = defaultdict[str | None, dict[int, list[Example]]](dict)
    for example in encoded.examples:  # a long text is several examples, which stay together
        rows[example.row.source].setdefault(id(example.row), []).append(example)
    found = list[Example]()
    for name, of_source in rows.items():
        whole, part = divmod(weights.get(name or "", 1.0), 1)
        groups = list(of_source.values())
        drawn = random.Random(f"{seed}-{name}").sample(range(len(groups)), round(part * len(groups)))
        taken = [*groups * int(whole), *(groups[place] for place in sorted(drawn))]
        found += [example for group in taken for example in group]
    return Encoded(found or encoded.examples[:1], encoded.report)
