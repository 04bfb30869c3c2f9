"""What a comparison's verdict says of an arm against full fine-tuning, for the pages that are made from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spectune.results.phrases import listed

__all__ = ["Point", "Versus", "curve", "grouped", "listed", "mean", "shares_of_weights", "versus_full"]


@dataclass(frozen=True)
class Versus:
    """An arm against full fine-tuning: "better", "worse" or "no difference", and the arm's mean less that of full with
    its interval, corrected for the number of pairs."""

    name: str
    label: str
    word: str
    difference: float
    low: float
    high: float

    @property
    def level(self) -> bool:
        return self.word != "worse"


def versus_full(part: Mapping[str, Any]) -> dict[str, Versus]:
    """Of every arm but full fine-tuning, best first. `part`: the verdict itself, of a metric, or of forgetting."""
    labels = {arm["name"]: arm["label"] for arm in part["arms"]}
    found = {}
    for name, word in part["versus_full"].items():
        pair = next(p for p in part["pairs"] if {p["a"], p["b"]} == {name, "full"})
        difference, low, high = pair["difference"], pair["low"], pair["high"]
        if pair["a"] == name:
            difference, low, high = -difference, -high, -low
        found[name] = Versus(name, labels[name], word, difference, low, high)
    return {arm["name"]: found[arm["name"]] for arm in part["arms"] if arm["name"] in found}


def mean(part: Mapping[str, Any], name: str) -> float:
    return float(next(arm["mean"] for arm in part["arms"] if arm["name"] == name))


def shares_of_weights(content: Mapping[str, Any]) -> dict[str, float]:
    """Trained weights of each arm as a share of the base's."""
    return {run["name"]: run["trainable_parameters"] / run["total_parameters"] for run in content["runs"]}


def grouped(found: Iterable[Versus]) -> dict[str, list[Versus]]:
    """Arms by their word, in this order: better, no difference, worse; empty groups are left out."""
    arms = list(found)
    groups = {word: [arm for arm in arms if arm.word == word] for word in ("better", "no difference", "worse")}
    return {word: group for word, group in groups.items() if group}


@dataclass(frozen=True)
class Point:
    """Some runs on as many rows: means over their seeds of the best validation loss and of that after the last step."""

    best: float
    last: float
    seeds: int


def curve(content: Mapping[str, Any]) -> dict[str, dict[int, Point]]:
    """Arm -> rows -> what was measured, for arms with two points or more: one is a final run and no curve."""
    table: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for run in content["curves"]:
        table.setdefault(run["name"], {}).setdefault(run["rows"], []).append(run)
    return {
        name: {
            rows: Point(
                sum(run["valid_loss"] for run in runs) / len(runs),
                sum(run["last_valid_loss"] for run in runs) / len(runs),
                len(runs),
            )
            for rows, runs in sorted(points.items())
        }
        for name, points in table.items()
        if len(points) > 1
    }
