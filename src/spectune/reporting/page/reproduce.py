"""What it takes to repeat a comparison: commands, settings, versions, and the results of each run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from spectune.errors import DataError
from spectune.files.metadata import read_json, without_seal
from spectune.files.plain_text import clipped, command_line
from spectune.files.regular import inside
from spectune.reporting import units
from spectune.reporting.artifacts import under_runs
from spectune.reporting.columns import loss_title, metric_text, metric_title
from spectune.reporting.grids import Grid
from spectune.results.arm_result import arm_results, metric_names, training_memory
from spectune.results.comparison_file import Arm, ComparedRun, ComparisonResult

#: characters of a setting
LONGEST = 20_000


@dataclass(frozen=True)
class RunLine:
    """One final run: where reasons point to."""

    anchor: str
    label: str
    seed: str
    cells: list[str]


def run_header(comparison: ComparisonResult) -> list[str]:
    losses = dict.fromkeys(["Valid loss", loss_title(comparison)])
    metrics = map(metric_title, metric_names(arm_results(comparison)))
    forgetting = ["Forgetting"] if comparison.has_text else []
    return ["Learning rate", "Steps", *losses, *metrics, *forgetting, "Memory", "Tokens/s", "Time", "Folder"]


def run_lines(comparison: ComparisonResult) -> list[RunLine]:
    labels, names = comparison.labels, metric_names(arm_results(comparison))
    lines: list[RunLine] = []
    for runs in comparison.runs_by_arm.values():
        for run in runs:
            judged = [] if loss_title(comparison) == "Valid loss" else [units.number(run.judged_loss)]
            cells = [
                units.rate(run.learning_rate),
                f"{run.steps:,}" if run.steps else units.MISSING,
                units.number(run.valid_loss),
                *judged,
                *(metric_text(name, run.metrics.get(name)) for name in names),
                *([units.number(run.forgetting_kl_nats_per_token)] if comparison.has_text else []),
                units.size(training_memory(run)),
                units.count(run.own_tokens_per_second),
                units.seconds(run.own_train_seconds),
                place_of(run),
            ]
            seed = units.MISSING if run.seed is None else str(run.seed)
            lines.append(RunLine(f"run-{len(lines)}", labels[run.name], seed, cells))
    return lines


def place_of(run: ComparedRun) -> str:
    """A run's folder, from the comparison's."""
    return str(PurePosixPath(run.rows_file).parent if run.rows_file else under_runs(run) or units.MISSING)


#: what a prediction has beside the terms of a step
_NO_TERMS = ("peak_allocated", "peak_reserved", "validation", "held")


def memory_grid(comparison: ComparisonResult) -> Grid | None:
    """Predicted bytes by term beside the measured peak; None where nothing was predicted."""
    predicted = {
        name: next((run.predicted_memory_bytes for run in runs if run.predicted_memory_bytes), {})
        for name, runs in comparison.runs_by_arm.items()
    }
    terms = list(dict.fromkeys(key for of in predicted.values() for key in of if key not in _NO_TERMS))
    body = []
    for arm in arm_results(comparison):
        if not (found := predicted.get(arm.name)):
            continue
        measured, peak = arm.train_memory_bytes, arm.predicted_memory_bytes
        error = units.MISSING if not measured or peak is None else f"{100 * (peak / measured - 1):+.1f}%"
        sizes = [units.size(value) for value in (*map(found.get, terms), peak, measured)]
        body.append([arm.label, *sizes, error, arm.memory_prediction_source or units.MISSING])
    header = ["Method", *(term.capitalize() for term in terms), "Peak, predicted", "Peak, measured", "Error", "From"]
    return Grid("Memory in training: predicted and measured", header, body, {0, len(header) - 1}) if body else None


def command(comparison: ComparisonResult, folder: Path) -> str | None:
    """The command line that would run it again; None where the folder does not say."""
    if given := comparison.command:
        return clipped(command_line(*given) if isinstance(given, list) else given, LONGEST)
    again = "spectune compare --config config.yaml --output-dir again"
    return again if (folder / "config.yaml").is_file() else None


def settings(comparison: ComparisonResult, folder: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, [(name, value)]): everything that decides the numbers."""
    arms: Sequence[Arm | ComparedRun] = comparison.arms or [runs[0] for runs in comparison.runs_by_arm.values()]
    found = [
        ("Base", _pairs(comparison.base.to_dict())),
        ("Data", _pairs(comparison.data.to_dict())),
        ("Budget", _pairs(comparison.preset.to_dict())),
        ("Training", _pairs(comparison.settings)),
        ("Methods", [(arm.name, _value(arm.settings)) for arm in arms]),
        ("Environment", _pairs(comparison.environment or _environment(comparison, folder))),
    ]
    return [(heading, pairs) for heading, pairs in found if pairs]


def _environment(comparison: ComparisonResult, folder: Path) -> Mapping[str, Any]:
    """Of the first run, where the comparison has none of its own."""
    for runs in comparison.runs_by_arm.values():
        place = inside(folder, f"{place_of(runs[0])}/environment.json")
        try:
            found = None if place is None else read_json(place)
        except DataError:
            continue
        if found is not None:
            return without_seal(found)
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
    return clipped(str(value), LONGEST)
