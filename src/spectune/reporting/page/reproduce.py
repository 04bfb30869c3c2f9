"""What it takes to repeat a comparison: commands, settings, versions, and what each single run came to."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from spectune.reporting import units
from spectune.reporting.arms import arm_labels, runs_by_arm
from spectune.reporting.columns import loss_title, metric_text, metric_title
from spectune.reporting.grids import Grid
from spectune.reporting.rows import MEMORY_KEY, PREDICTED_KEY, comparison_rows, metric_names
from spectune.reporting.text import plain

TERMS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")


@dataclass(frozen=True)
class RunLine:
    """One final run: where reasons point to."""

    anchor: str
    label: str
    seed: str
    cells: list[str]


def run_header(comparison: Mapping[str, Any]) -> list[str]:
    names = metric_names(comparison_rows(comparison))
    titles = ["Learning rate", "Steps", "Valid loss", loss_title(comparison), *map(metric_title, names)]
    if loss_title(comparison) == "Valid loss":
        titles.pop(3)
    return [*titles, "Forgetting", "Memory", "Tokens/s", "Time", "Folder"]


def run_lines(comparison: Mapping[str, Any]) -> list[RunLine]:
    labels, names = arm_labels(comparison), metric_names(comparison_rows(comparison))
    lines: list[RunLine] = []
    for runs in runs_by_arm(comparison).values():
        for run in runs:
            judged = [] if loss_title(comparison) == "Valid loss" else [units.number(run.get("judged_loss"))]
            metrics = run.get("metrics") or {}
            cells = [
                units.rate(run["learning_rate"]),
                f"{run['steps']:,}" if run.get("steps") else units.MISSING,
                units.number(run["valid_loss"]),
                *judged,
                *(metric_text(name, metrics.get(name)) for name in names),
                units.number(run.get("forgetting_kl_nats_per_token")),
                units.size(run["peak_memory_bytes"].get(MEMORY_KEY)),
                units.count(run["train_tokens_per_second"]),
                units.seconds(run["train_seconds"]),
                place_of(run),
            ]
            lines.append(RunLine(f"run-{len(lines)}", labels[run["name"]], str(run.get("seed", "-")), cells))
    return lines


def place_of(run: Mapping[str, Any]) -> str:
    """A run's folder, from the comparison's."""
    if run.get("rows_file"):
        return str(PurePosixPath(str(run["rows_file"])).parent)
    parts = PurePosixPath(str(run.get("folder") or "")).parts
    return "/".join(parts[len(parts) - 1 - parts[::-1].index("runs") :]) if "runs" in parts else units.MISSING


def memory_grid(comparison: Mapping[str, Any]) -> Grid | None:
    """Predicted bytes by term beside the measured peak; None where nothing was predicted."""
    labels = arm_labels(comparison)
    body = []
    for name, runs in runs_by_arm(comparison).items():
        predicted = next((found for run in runs if (found := run.get("predicted_memory_bytes"))), None)
        if not predicted:
            continue
        measured = max((m for run in runs if (m := run["peak_memory_bytes"].get(MEMORY_KEY))), default=None)
        peak = predicted.get(PREDICTED_KEY)
        error = None if not measured or peak is None else peak / measured - 1
        body.append(
            [
                labels[name],
                *(units.size(predicted.get(term)) for term in TERMS),
                units.size(peak),
                units.size(measured),
                units.MISSING if error is None else f"{100 * error:+.1f}%",
                str(runs[0].get("memory_prediction_source") or units.MISSING),
            ]
        )
    header = ["Method", *(term.capitalize() for term in TERMS), "Peak, predicted", "Peak, measured", "Error", "From"]
    return Grid("Memory in training: predicted and measured", header, body, {0, len(header) - 1}) if body else None


def command(comparison: Mapping[str, Any], folder: Path) -> str | None:
    """The command line that would run it again; None where the folder does not say."""
    given = comparison.get("command")
    if given:
        return shlex.join(map(str, given)) if isinstance(given, list) else plain(str(given))
    if (folder / "config.yaml").is_file():
        return "spectune compare --config config.yaml --output-dir again"
    return None


def settings(comparison: Mapping[str, Any], folder: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, [(name, value)]): everything that decides the numbers."""
    found = [
        ("Base", _pairs(comparison["base"])),
        ("Data", _pairs(comparison["data"])),
        ("Budget", _pairs(comparison.get("preset") or {})),
        ("Training", _pairs(comparison.get("settings") or {})),
        ("Methods", [(str(arm["name"]), _value(arm.get("settings") or {})) for arm in _arms(comparison)]),
        ("Environment", _pairs(comparison.get("environment") or _environment(comparison, folder))),
    ]
    return [(heading, pairs) for heading, pairs in found if pairs]


def _arms(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(comparison.get("arms") or [runs[0] for runs in runs_by_arm(comparison).values()])


def _environment(comparison: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Of the first run, where the comparison has none of its own."""
    for runs in runs_by_arm(comparison).values():
        try:
            found = json.loads((folder / place_of(runs[0]) / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _pairs(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(key), _value(value)) for key, value in content.items()]


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(f"({_value(v)})" if isinstance(v, list | tuple) else _value(v) for v in value) or "none"
    return plain(str(value))
