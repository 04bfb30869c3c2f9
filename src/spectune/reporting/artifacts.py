"""What the runs left in a comparison's folder: judged rows and learning curves. Whatever is missing or damaged is left
out: a report is made from what is there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any


@dataclass(frozen=True)
class Curve:
    """Losses of one run, in nats per token, against training steps."""

    valid: list[tuple[float, float]]
    train: list[tuple[float, float]]


def judged_rows(folder: Path, run: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """The lines of a run's `rows.jsonl` by their row."""
    path = run.get("rows_file")
    return {} if not path else rows_of(folder, str(path))


def base_rows(folder: Path) -> dict[int, Mapping[str, Any]]:
    return rows_of(folder, "base/rows.jsonl")


def rows_of(folder: Path, path: str) -> dict[int, Mapping[str, Any]]:
    inside = _inside(folder, path)
    lines = [] if inside is None else _lines(inside)
    return {line["row"]: line for line in lines if isinstance(line.get("row"), int)}


def curve(folder: Path, run: Mapping[str, Any]) -> Curve | None:
    """From a run's `metrics.jsonl`; None where there is none."""
    place = run_folder(folder, run)
    if place is None:
        return None
    valid, train = [], []
    for line in _lines(place / "metrics.jsonl"):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        if _finite(line.get("valid_loss")):
            valid.append((float(step), float(line["valid_loss"])))
        elif _finite(line.get("loss")):
            train.append((float(step), float(line["loss"])))
    return Curve(valid, train) if valid or train else None


def run_folder(folder: Path, run: Mapping[str, Any]) -> Path | None:
    """Where a run lies now: beside its rows, or under `runs/` if the comparison has been moved since."""
    if run.get("rows_file"):
        place = _inside(folder, str(PurePosixPath(str(run["rows_file"])).parent))
        if place is not None:
            return place
    parts = PurePosixPath(str(run.get("folder") or "")).parts
    if "runs" not in parts:
        return None
    last = len(parts) - 1 - parts[::-1].index("runs")
    return _inside(folder, str(PurePosixPath(*parts[last:])))


def _inside(folder: Path, path: str) -> Path | None:
    """The path if it is there and leads nowhere else."""
    found = (folder / path).resolve()
    return found if found.exists() and found.is_relative_to(folder.resolve()) else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    found = json.loads(line)
                except ValueError:
                    continue  # cut short by a crash
                if isinstance(found, dict):
                    yield found
    except (OSError, UnicodeDecodeError):
        return


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
