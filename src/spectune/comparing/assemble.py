"""A comparison's content, put together from the folders of its runs: what `comparison.json` holds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectune.comparing import conditions
from spectune.comparing.advising.limits import Limits
from spectune.comparing.advising.recommend import recommend
from spectune.comparing.job import FAILED, curve_point
from spectune.comparing.judging.verdict import verdict
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
    fixed = schedule["fixed_learning_rate"]
    found_rates = {arm["name"]: _json(folder / "search" / arm["name"] / "search.json") for arm in arms}
    # where the rate was given, what an earlier call searched for is not what was run
    searches = {name: search for name, search in found_rates.items() if search and fixed is None}
    runs: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    for arm in arms:
        name = arm["name"]
        rate = fixed if fixed is not None else searches.get(name, {}).get("best")
        ends = [_failure(folder / "search" / name)]
        for seed in schedule["seeds"]:
            place = _final_folder(folder, found, arm, rate, seed)
            if place is not None and (run := _measured(place)) is not None:
                runs.append({**run.model_dump(mode="json"), "label": arm["label"], "best_for": arm["best_for"]})
            elif place is not None and (end := _failure(place)) is not None:
                ends.append(end)
            elif not any(end is not None and end.given_up for end in ends):
                missing.append({"name": name, "seed": seed})
        curves += _curve(folder, found, arm, rate)
        ends.append(_failure(folder / "curve" / name))
        failed += [end.entry for end in ends if end is not None]
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


def _final_folder(
    folder: Path, found: Mapping[str, Any], arm: Mapping[str, Any], rate: float | None, seed: int
) -> Path | None:
    """Where the final run of a seed lies under just these conditions; None where no rate is known yet."""
    if rate is None:
        return None
    key = conditions.run_key(found["identity"], arm["settings"], rate, found["preset"]["final_steps"], seed)
    return folder / conditions.final_place(arm["name"], seed, key)


def _measured(folder: Path) -> RunResult | None:
    """The run in a folder, if it has been measured."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    run = RunResult.load(path)
    return run if run.key is not None else None


@dataclass(frozen=True)
class _Failure:
    """An entry of `failed`, and whether nothing more of its arm was tried."""

    entry: dict[str, Any]
    given_up: bool


def _failure(folder: Path) -> _Failure | None:
    found = _json(folder / FAILED)
    return None if found is None else _Failure(found, bool(found.pop("given_up", False)))


def _curve(
    folder: Path, found: Mapping[str, Any], arm: Mapping[str, Any], rate: float | None
) -> Iterator[dict[str, Any]]:
    """The points of an arm's data curve; final runs are those with all rows."""
    if rate is None:
        return
    all_rows, seeds = found["data"]["train_examples"], found["preset"]["seeds"]
    for rows, steps in found["preset"]["curve"]:
        for seed in seeds:
            if rows == all_rows:
                place = _final_folder(folder, found, arm, rate, seed)
                run = None if place is None else _measured(place)
                point = None if run is None else curve_point(run, arm["name"], all_rows)
            else:
                key = conditions.run_key(found["identity"], arm["settings"], rate, steps, seed, rows)
                point = _json(folder / conditions.curve_place(arm["name"], rows, seed, key) / "result.json")
            if point:
                yield point


def _counts(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    first = next((run for run in runs if run["name"] == name), None)
    return {key: None if first is None else first[key] for key in ("stored_parameters", "trainable_parameters")}


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object on disk; None where there is no such file. Raises DataError where it is damaged."""
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Remove it, and run the comparison again with --resume."
        ) from error
    return found
