"""What the runs left in a comparison's folder: judged rows and learning curves. Whatever is missing or damaged is left
out: a report is made from what is there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from spectune.errors import DataError
from spectune.files.metadata import read_lines
from spectune.files.regular import inside
from spectune.results.arm_result import is_finite
from spectune.results.comparison_file import ComparedRun

#: no run takes as many
MOST_STEPS = 2**40


@dataclass(frozen=True)
class Curve:
    """Losses of one run, in nats per token, against training steps."""

    valid: list[tuple[float, float]]
    train: list[tuple[float, float]]


def judged_rows(folder: Path, run: ComparedRun) -> dict[int, Mapping[str, Any]]:
    """The lines of a run's `rows.jsonl` by their row."""
    return {} if not run.rows_file else rows_of(folder, run.rows_file)


def rows_of(folder: Path, path: str) -> dict[int, Mapping[str, Any]]:
    found = _inside(folder, path)
    return {line["row"]: line for line in _lines(found) if is_row(line)} if found else {}


def is_row(line: Mapping[str, Any]) -> bool:
    """Whether a line is of the types that are shown of it."""
    types = {"row": int, "loss_sum": int | float | None, "target_tokens": int | float | None, "origin": str | None}
    types |= {"prompt": str | None, "prediction": str | None, "references": list | None, "metrics": dict | None}
    fits = all(isinstance(line.get(key), kind) for key, kind in types.items())
    return fits and all(isinstance(value, int | float | None) for value in (line.get("metrics") or {}).values())


def curve(folder: Path, run: ComparedRun) -> Curve | None:
    """From a run's `metrics.jsonl`; None where there is none."""
    if (place := run_folder(folder, run)) is None:
        return None
    valid, train = [], []
    for line in _lines(place / "metrics.jsonl"):
        if not isinstance(step := line.get("step"), int) or not 0 <= step < MOST_STEPS:
            continue
        if is_shown(line.get("valid_loss")):
            valid.append((float(step), float(line["valid_loss"])))
        elif is_shown(line.get("loss")):
            train.append((float(step), float(line["loss"])))
    return Curve(valid, train) if valid or train else None


def is_shown(value: object) -> TypeGuard[float]:
    """Whether it is a number that an axis can have."""
    return is_finite(value) and abs(value) < 1e30


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
    found = inside(folder, path)
    return found if found is not None and found.exists() else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for _, line in read_lines(path, skipped=lambda _: None):  # cut short by a crash
            yield line
    except DataError:
        return
