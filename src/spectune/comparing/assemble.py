"""A comparison's content, put together from the folders of its runs: what `comparison.json` holds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spectune.comparing import conditions
from spectune.comparing.job import FAILED, curve_point
from spectune.comparing.limits import Limits
from spectune.comparing.recommend import recommend
from spectune.comparing.verdict import verdict
from spectune.errors import DataError
from spectune.training import RunResult


def assemble(folder: Path, limits: Limits | None = None) -> dict[str, Any]:
    """Everything that the runs in a comparison's folder say, with the verdict and the recommendation that follow.

    Runs that are not there (a comparison that was killed) are named under `missing`; runs under other settings than
    the last call's, which an earlier call left, are not taken.

    Args:
        limits: of the user; by default those that the comparison was made with.

    Raises:
        DataError: the folder holds no comparison, or a result in it is damaged.
    """
    found = conditions.read(folder)
    schedule, arms = found["preset"], found["arms"]
    searches = {
        arm["name"]: search for arm in arms if (search := _json(folder / "search" / arm["name"] / "search.json"))
    }
    runs: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    for arm in arms:
        name = arm["name"]
        fixed = schedule["fixed_learning_rate"]
        rate = fixed if fixed is not None else searches.get(name, {}).get("best")
        no_rate = _json(folder / "search" / name / FAILED)
        failed += [no_rate] if no_rate else []
        for seed in schedule["seeds"]:
            run = _final(folder / "runs" / name, seed, rate, schedule["final_steps"])
            reason = _failure(folder / "runs" / name, seed, rate)
            if run is not None:
                runs.append({**run.model_dump(mode="json"), "label": arm["label"], "best_for": arm["best_for"]})
            elif reason is not None:
                failed.append(reason)
            elif not no_rate and not any(f["name"] == name for f in failed):
                missing.append({"name": name, "seed": seed})
        curves += _curve(folder, name, rate, schedule, found["data"]["train_examples"])
        no_point = _json(folder / "curve" / name / FAILED)
        failed += [no_point] if no_point else []
    content = {
        **{key: found[key] for key in ("base", "data", "settings", "environment", "scale")},
        "preset": schedule,
        "arms": [{**arm, **_counts(arm["name"], runs)} for arm in arms],
        "searches": searches,
        "runs": runs,
        "curves": curves,
        "failed": failed,
        "missing": missing,
    }
    rates = [run["decode_tokens_per_second_base"] for run in runs if run["decode_tokens_per_second_base"]]
    content["base"] = {**found["base"], "decode_tokens_per_second": statistics.median(rates) if rates else None}
    content["verdict"] = verdict(content, folder)
    content["recommendation"] = recommend(content, limits if limits is not None else Limits(**found["limits"]))
    return content


def _final(folder: Path, seed: int, rate: float | None, steps: int) -> RunResult | None:
    """The measured run of a seed at a rate. Of several, which differ in what `conditions.json` does not tell, the
    newest."""
    there = sorted(folder.glob(f"seed-{seed}-*/result.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    results = (RunResult.load(path) for path in there)
    fitting = (
        r for r in results if r.key is not None and (r.stopped_early or r.steps == steps) and r.learning_rate == rate
    )
    return next(fitting, None)


def _failure(folder: Path, seed: int, rate: float | None) -> dict[str, Any] | None:
    found = (_json(path) for path in folder.glob(f"seed-{seed}-*/{FAILED}"))
    return next((entry for entry in found if entry and entry["learning_rate"] == rate), None)


def _curve(
    folder: Path, name: str, rate: float | None, schedule: Mapping[str, Any], all_rows: int
) -> Iterator[dict[str, Any]]:
    """The points of an arm's data curve; final runs are those with all rows."""
    planned = dict(schedule["curve"])
    for path in sorted((folder / "curve" / name).glob("*/result.json")):
        point = _json(path)
        if point and point["learning_rate"] == rate and planned.get(point["rows"]) == point["steps"]:
            yield point
    if all_rows in planned:
        for seed in schedule["seeds"]:
            run = _final(folder / "runs" / name, seed, rate, schedule["final_steps"])
            if run is not None:
                yield curve_point(run, name, all_rows)


def _counts(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    first = next((run for run in runs if run["name"] == name), None)
    return {key: None if first is None else first[key] for key in ("stored_parameters", "trainable_parameters")}


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object on disk; None where there is no such file. Raises DataError where it is damaged."""
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Remove it, and run the comparison again with --resume."
        ) from error
    return found
