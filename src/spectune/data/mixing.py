"""Several data sources in one training set, each with a weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectune.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """One of several data sources: `spectune.train(..., [Source("a.jsonl"), Source("b.jsonl", weight=0.5)])`.

    Attributes:
        data: a path, rows, or whatever else `load_rows` takes.
        weight: how often an epoch of training has each of its rows: 1 once, 2 twice, 0.5 a seeded half of them. Rows to
            validate and to judge on are taken once each, whatever the weight.
        name: by which losses are reported; by default the file's name without its folder and suffix.

    Raises:
        ConfigError: a weight that is not a number above 0, a name that is not text, or sources as data.
    """

    data: Any
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and (not isinstance(self.name, str) or not self.name.strip()):
            raise ConfigError(f"a data source has the name {self.name!r}; expected text")
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float):
            raise ConfigError(f"data {self.label}: weight = {self.weight!r}; expected a number above 0")
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"data {self.label}: weight = {self.weight:g}; expected a number above 0")
        parts = self.data if isinstance(self.data, list | tuple) else [self.data]
        if any(isinstance(part, Source) for part in parts):
            raise ConfigError(f"data {self.label}: a source within a source; expected all of them in one list")

    @property
    def label(self) -> str:
        """Its name in reports."""
        if self.name is not None:
            return self.name
        path = self.data if isinstance(self.data, str | Path) else "rows"
        return Path(path).name.partition(".")[0] or str(path)


def sources_in(given: Any) -> list[Source]:
    """The sources that data are given as, a path among them as one of weight 1, with names no two of which are alike
    (`train`, `train-2`); none where the data are something else. Raises ConfigError: sources are mixed with rows."""
    parts = [given] if isinstance(given, Source) else given if isinstance(given, list | tuple) else []
    if not any(isinstance(part, Source) for part in parts):
        return []
    if wrong := [part for part in parts if not isinstance(part, Source | str | Path)]:
        kind = type(wrong[0]).__name__
        raise ConfigError(f"data: a {kind} beside a Source; expected Source({kind}, ...) for each, or paths")
    return _named([part if isinstance(part, Source) else Source(part) for part in parts])


def _named(sources: Sequence[Source]) -> list[Source]:
    found, taken = list[Source](), set[str]()
    for source in sources:
        numbers = (source.label if n == 1 else f"{source.label}-{n}" for n in range(1, len(sources) + 2))
        name = next(name for name in numbers if name not in taken)
        taken.add(name)
        found.append(replace(source, name=name))
    return found


def weight_changes(before: Mapping[str, float], now: Mapping[str, float], what: str) -> list[str]:
    """A line for each source whose weight is another than it was in `what`; a source without one has 1."""
    names = dict.fromkeys([*before, *now])
    pairs = {name: (before.get(name, 1), now.get(name, 1)) for name in names}
    return [f"weight of data {name}: {a:g} in the {what}, {b:g} now" for name, (a, b) in pairs.items() if a != b]
