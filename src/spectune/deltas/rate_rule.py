"""A method's learning rate as a function of the base's hidden size: through measured and published points, by a power
law between two of them, and level outside."""

import math
from dataclasses import dataclass
from itertools import pairwise

#: sources of points of several methods
SWEEPS = "our sweeps of 5M to 120M bases"
TINKER = "Tinker's sweeps of Llama 1B, 8B and 70B"
#: a search goes so far down and up from the default, where the points around a base are strong, and where one is weak
REACH, WEAK_REACH = 10.0, 30.0


@dataclass(frozen=True)
class RatePoint:
    """The best rate known at one hidden size.

    Attributes:
        source: where it is from, a noun phrase.
        strong: the best of several rates that were tried; a weak one is a setting that a paper or a tool used.
    """

    hidden: int
    rate: float
    source: str
    strong: bool = True


@dataclass(frozen=True)
class BaseRate:
    """What a rule says of one base.

    Attributes:
        rate: the default, of two significant digits.
        source: of the points that it is from.
        strong: all of these points are.
    """

    hidden: int
    rate: float
    source: str
    strong: bool

    @property
    def search_range(self) -> tuple[float, float]:
        """The lowest and the highest rate that a search tries at first."""
        reach = REACH if self.strong else WEAK_REACH
        return self.rate / reach, self.rate * reach

    def around(self, ratio: float) -> tuple[float, float]:
        """Two rates whose ratio is `ratio`, and between which the default lies."""
        return self.rate / math.sqrt(ratio), self.rate * math.sqrt(ratio)

    @property
    def sentence(self) -> str:
        """`by rule for hidden size 4,096, from ...: strong evidence`."""
        evidence = "strong" if self.strong else "weak"
        return f"by rule for hidden size {self.hidden:,}, from {self.source}; {evidence} evidence"


@dataclass(frozen=True)
class RateRule:
    """Points from narrow to wide bases."""

    points: tuple[RatePoint, ...]

    def at(self, hidden: int) -> BaseRate:
        """The rate for a base of this hidden size."""
        first, last = self.points[0], self.points[-1]
        if hidden <= first.hidden or hidden >= last.hidden:
            end = first if hidden <= first.hidden else last
            return BaseRate(hidden, end.rate, end.source, end.strong)
        low, high = next(pair for pair in pairwise(self.points) if pair[0].hidden <= hidden < pair[1].hidden)
        if hidden == low.hidden:
            return BaseRate(hidden, low.rate, low.source, low.strong)
        share = math.log(hidden / low.hidden) / math.log(high.hidden / low.hidden)
        rate = float(f"{low.rate * (high.rate / low.rate) ** share:.2g}")
        source = low.source if low.source == high.source else f"{low.source} and {high.source}"
        return BaseRate(hidden, rate, source, low.strong and high.strong)
