"""Which runs belong together: an arm is one method with its settings, run with one or several seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Failure:
    """A run that did not end, and why."""

    name: str
    label: str
    seed: int | None
    learning_rate: float | None
    reason: str


def runs_by_arm(comparison: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs that ended, by the name of their arm, seeds in order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in comparison["runs"]:
        found.setdefault(run["name"], []).append(run)
    return {name: sorted(runs, key=lambda run: run.get("seed") or 0) for name, runs in found.items()}


def failures(comparison: Mapping[str, Any]) -> list[Failure]:
    labels = arm_labels(comparison)
    return [
        Failure(
            name=name_of(run),
            label=labels[name_of(run)],
            seed=run.get("seed"),
            learning_rate=run.get("learning_rate"),
            reason=run["reason"],
        )
        for run in comparison["failed"]
    ]


def arm_labels(comparison: Mapping[str, Any]) -> dict[str, str]:
    """What each arm is called; two of the same label are told apart by their names."""
    entries = [*comparison.get("arms", ()), *comparison["runs"], *comparison["failed"]]
    given = {name_of(entry): str(entry["label"]).strip() or name_of(entry) for entry in reversed(entries)}
    names = list(dict.fromkeys(name_of(entry) for entry in entries))
    firsts: dict[str, str] = {}
    for name in names:
        firsts.setdefault(given[name], name)
    return {name: given[name] if firsts[given[name]] == name else f"{given[name]} ({name})" for name in names}


def name_of(entry: Mapping[str, Any]) -> str:
    return str(entry.get("name") or entry["method"])


def method_of(name: str, comparison: Mapping[str, Any]) -> str:
    entries = [*comparison.get("arms", ()), *comparison["failed"]]
    return next((str(entry["method"]) for entry in entries if name_of(entry) == name), name)
