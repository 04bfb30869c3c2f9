"""Whether a run is within tolerance, and of what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.parity import paths
from benchmarks.parity.paths import Path

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """One figure and what it may be; `least`: at least, otherwise at most."""

    name: str
    value: float
    bound: float
    least: bool = False

    @property
    def holds(self) -> bool:
        # written so that a figure that is no number does not hold
        return self.value >= self.bound if self.least else self.value <= self.bound


def checks(path: Path, line: Line, known: Mapping[str, Line]) -> list[Check]:
    """Of one run.

    Args:
        known: the lines of the same method on the same device, by path: what plain runs gave.

    Raises:
        KeyError: a plain run that a tolerance is made of is not there.
    """
    if path.kind == "exact":
        return _exact(line, known["plain"], known["plain-attention"])
    if path.kind == "rounding":
        return _rounding(line, known["plain-bf16"], known["plain-bf16-last-bit"])
    return _approximate(path, line, known)


def _exact(line: Line, plain: Line, control: Line) -> list[Check]:
    held, free, apart = line["held"], line["free"], control["free"]
    return [
        Check("loss at given weights", held["loss"], paths.HELD_LOSS),
        Check("gradient at given weights", held["error"], _float32(plain)),
        Check("losses, first steps", free["early"], max(paths.EARLY, paths.TIMES_CONTROL * apart["early"])),
        Check("losses, all steps", free["largest"], max(paths.LATE, paths.TIMES_CONTROL * apart["largest"])),
        Check("validation loss", abs(free["valid"]), max(paths.VALID, paths.TIMES_CONTROL * abs(apart["valid"]))),
    ]


def _rounding(line: Line, plain: Line, control: Line) -> list[Check]:
    held, free, own = line["held"], line["free"], plain["held"]
    draws = [plain["free"], control["free"]]
    parted = {name: max(abs(draw[name]) for draw in draws) for name in ("largest", "valid")}
    return [
        Check("loss at given weights", held["loss"], paths.TIMES_BF16 * max(paths.BF16_LOSS, own["loss"])),
        Check("gradients at given weights", held["pooled"], paths.TIMES_BF16 * own["pooled"]),
        Check("losses, all steps", free["largest"], max(paths.BF16_FREE, paths.TIMES_PARTED * parted["largest"])),
        Check("validation loss", abs(free["valid"]), max(paths.BF16_VALID, paths.TIMES_PARTED * parted["valid"])),
    ]


def _approximate(path: Path, line: Line, known: Mapping[str, Line]) -> list[Check]:
    found = [
        Check("cosine at given weights", line["held"]["least_cosine"], path.cosine, least=True),
        Check("validation loss", abs(line["free"]["valid"]), path.valid),
    ]
    if path.decoded and "held_decoded" in line:
        plain = known["plain-bf16" if line["dtype"] == "bfloat16" else "plain"]
        if line["dtype"] == "bfloat16":
            value, bound = line["held_decoded"]["pooled"], paths.TIMES_BF16 * plain["held"]["pooled"]
        else:
            value, bound = line["held_decoded"]["error"], _float32(plain)
        found.append(Check("gradients over the decoded base", value, bound))
    return found


def _float32(plain: Line) -> float:
    """The relative error of a float32 gradient that is tolerated."""
    return max(paths.HELD_GRADIENT, paths.TIMES_PLAIN * plain["held"]["error"])
