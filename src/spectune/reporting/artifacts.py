"""What the runs left in a comparison's folder: judged rows and learning curves. Whatever is missing or damaged is left
out: a report is made from what is there."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from spectune.results.arm_result import is_finite
from spectune.results.comparison_file import ComparedRun


@dataclass(frozen=True)
class Curve:
    """Losses of one run, in nats per token, against training steps."""

    valid: list[tuple[float, float]]
    train: list[tuple[float, float]]


def judged_rows(folder: Path, run: ComparedRun) -> dict[int, Mapping[str, Any]]:
    """The lines of a run's `rows.jsonl` by their row."""
    return {} if not run.rows_file else rows_of(folder, run.rows_file)


def rows_of(folder: Path, path: str) -> dict[int, Mapping[str, Any]]:
    inside = _inside(folder, path)
    return {line["row"]: line for line in _lines(inside) if isinstance(line.get("row"), int)} if inside else {}


def curve(folder: Path, run: ComparedRun) -> Curve | None:
    """From a run's `metrics.jsonl`; None where there is none."""
    if (place := run_folder(folder, run)) is None:
        return None
    valid, train = [], []
    for line in _lines(place / "metrics.jsonl"):
        if not isinstance(step := line.get("step"), int):
            continue
        if is_finite(line.get("valid_loss")):
            valid.append((float(step), float(line["valid_loss"])))
        elif is_finite(line.get("loss")):
            train.append((float(step), float(line["loss"])))
    return Curve(valid, train) if valid or train else None


def run_folder(folder: Path, run: ComparedRun) -> Path | None:
    """The folder of a run now: beside its rows, or under `runs/` if the comparison has been moved since."""
    places = [PurePosixPath(run.rows_file).parent] if run.rows_file else []
    if moved := under_runs(run):
        places.append(moved)
    return next((inside for place in places if (inside := _inside(folder, str(place))) is not None), None)


def under_runs(run: ComparedRun) -> PurePosixPath | None:
    """The part of a run's folder from its comparison's `runs/` on."""
    parts = PurePosixPath(run.folder or "").parts
    return PurePosixPath(*parts[len(parts) - 1 - parts[::-1].index("runs") :]) if "runs" in parts else None


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
