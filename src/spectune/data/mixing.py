"""Several data sources in one training set, each with a weight."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectune.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """One of several data sources.

    Attributes:
        data: a path, rows, or whatever else `load_rows` takes.
        weight: how often an epoch of training has each of its rows: 1 once, 2 twice, 0.5 a seeded half of them. Rows to
            validate and to judge on are taken once each, whatever the weight.
        name: by which losses are reported; by default the file's name without its folder and suffix.

    Raises:
        ConfigError: a weight that is not above 0.
    """

    data: Any
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"data {self.label}: weight = {self.weight:g}; expected a number above 0")

    @property
    def label(self) -> str:
        """Its name in reports."""
        if self.name is not None:
            return self.name
        path = self.data if isinstance(self.data, str | Path) else "rows"
        return Path(path).name.partition(".")[0] or str(path)


def named_sources(sources: Sequence[Source]) -> list[Source]:
    """Sources with a name each, no two alike: `train`, `train-2`."""
    found, taken = list[Source](), defaultdict[str, int](int)
    for source in sources:
        taken[source.label] += 1
        number = taken[source.label]
        found.append(replace(source, name=source.label if number == 1 else f"{source.label}-{number}"))
    return found
