"""What all runs of a comparison share, and the folder of each: `conditions.json` and the keys of run folders."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from spectune.data import weight_changes
from spectune.errors import DataError
from spectune.families import differences
from spectune.results import Limits
from spectune.results.comparison_file import Conditions
from spectune.training.identity import OtherRunError

FILE = "conditions.json"
KEYS = {"base", "data", "settings", "preset", "environment", "scale", "arms", "limits", "identity"}


class RecordedConditions(Conditions):
    """What all runs of a comparison share, as `conditions.json` has it.

    Attributes:
        fingerprint: of the base; None in files of versions that took none.
        identity: what the runs' results depend on.
        metric_code: hashes of the user's metrics. No part of the identity: where they have changed, runs are judged
            again, and not trained again.
        limits: of the user, for the recommendation.
    """

    fingerprint: Any = None
    identity: dict[str, Any] = Field(default_factory=dict)
    metric_code: list[str] | None = None
    limits: Limits = Field(default_factory=Limits)


def key(*parts: Any) -> str:
    """Eight hexadecimal digits that stand for everything that a run's result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def run_key(
    identity: Mapping[str, Any], method: Mapping[str, Any], rate: float, steps: int, seed: int, rows: int | None = None
) -> str:
    """The key of a run; the same from a comparison's settings and from what `conditions.json` has of them.

    Args:
        method: its settings, as JSON.
        rows: on a data curve, how many it was trained on.
    """
    return key(dict(identity), dict(method), rate, steps, seed, rows)


def final_place(arm: str, seed: int, key: str) -> Path:
    """The folder of a final run, within its comparison's."""
    return Path("runs") / arm / f"seed-{seed}-{key}"


def curve_place(arm: str, rows: int, seed: int, key: str) -> Path:
    """The folder of a run on fewer rows, within its comparison's."""
    return Path("curve") / arm / f"{rows}-seed-{seed}-{key}"


def read(folder: Path) -> RecordedConditions:
    """The conditions of the comparison in a folder. Raises DataError where there are none, or damaged ones."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or KEYS - set(found):
            raise ValueError(f"expected an object with {', '.join(sorted(KEYS))}")
        return RecordedConditions.model_validate(found)
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(
            f"{path} cannot be read as the conditions of a comparison: {error}. Expected the folder of `spectune "
            "compare`."
        ) from error


def check(recorded: RecordedConditions, wanted: RecordedConditions, folder: Path) -> None:
    """Compare the conditions that a folder's runs had with those that are asked for. Methods, seeds and the preset may
    differ: runs that are not there yet are made. One method's settings may not.

    Raises:
        OtherRunError: names every difference.
    """
    # by way of JSON, which has no tuples
    now = json.loads(json.dumps(wanted.identity, default=str))
    lines = _differences(recorded.identity, now)
    if recorded.identity.get("data_sha256") != now.get("data_sha256"):
        before, after = ({n: s.weight for n, s in found.data.sources.items()} for found in (recorded, wanted))
        lines += weight_changes(before, after, "comparison")
    kinds = [found.base.device.partition(":")[0] for found in (recorded, wanted)]
    if kinds[0] != kinds[1]:
        lines.append(f"device: {kinds[0]} in the comparison, {kinds[1]} now: speed and memory would not compare")
    # two bases may have one name: a folder that was written anew, or a model without a name
    here = wanted.fingerprint
    lines += [f"base: {line}" for line in differences(recorded.fingerprint or here, here)]
    recorded_settings = {arm.name: arm.settings for arm in recorded.arms}
    for arm in wanted.arms:
        settings = json.loads(json.dumps(arm.settings, default=str))
        old = recorded_settings.get(arm.name, settings)
        lines += [
            f"{arm.name}.{name}: {old.get(name)!r} in the comparison, {value!r} now"
            for name, value in settings.items()
            if old.get(name) != value
        ]
    if lines:
        raise OtherRunError(
            f"{folder} holds a comparison under other conditions; go on with the same, or start in a new folder:\n"
            + "\n".join(lines)
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each thing that is not as it was."""
    lines = []
    for name, value in now.items():
        old = before.get(name)
        if old == value:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            lines += [f"{name}.{line}" for line in _differences(old, value)]
        elif name == "passages_sha256":
            lines.append(
                "passages: the comparison was measured on other passages (--retain, or another seed): forgetting would "
                "not compare"
            )
        elif name.endswith("_sha256"):
            lines.append(f"{name.removesuffix('_sha256')}: other rows than those of the comparison")
        else:
            lines.append(f"{name}: {old!r} in the comparison, {value!r} now")
    return lines
