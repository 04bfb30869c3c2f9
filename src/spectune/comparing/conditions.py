"""What all runs of a comparison share, and where each of them lies: `conditions.json` and the keys of run folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectune.errors import DataError
from spectune.storage import atomic_write_text
from spectune.storage.strict_json import strict_json
from spectune.training.identity import OtherRunError

FILE = "conditions.json"


def key(*parts: Any) -> str:
    """Eight hexadecimal digits that stand for everything that a run's result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def write(folder: Path, conditions: Mapping[str, Any]) -> None:
    atomic_write_text(folder / FILE, strict_json(dict(conditions)) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The conditions of the comparison in a folder. Raises DataError where there is none."""
    path = folder / FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as the conditions of a comparison: {error}. Expected the folder of `spectune "
            "compare`."
        ) from error
    return found


def check(recorded: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Compare the conditions that a folder's runs had with those that are asked for. Methods, seeds and the preset may
    differ: runs that are not there yet are made. One method's settings may not.

    Raises:
        OtherRunError: names every difference.
    """
    before, now = recorded["identity"], wanted["identity"]
    # by way of JSON, which has no tuples
    now = json.loads(json.dumps(now, default=str))
    lines = [_difference(name, before.get(name), value) for name, value in now.items() if before.get(name) != value]
    settings = {arm["name"]: arm["settings"] for arm in recorded["arms"]}
    for arm in json.loads(json.dumps(wanted["arms"], default=str)):
        old = settings.get(arm["name"], arm["settings"])
        lines += [
            f"{arm['name']}.{name}: {old.get(name)!r} in the comparison, {value!r} now"
            for name, value in arm["settings"].items()
            if old.get(name) != value
        ]
    if lines:
        raise OtherRunError(
            f"{folder} holds a comparison under other conditions; go on with the same, or start in a new folder:\n"
            + "\n".join(lines)
        )


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "passages_sha256":
        return (
            "passages: the comparison was measured on other passages (--retain, or another seed): forgetting would not "
            "compare"
        )
    if name.endswith("_sha256"):
        return f"{name.removesuffix('_sha256')}: other rows than those of the comparison"
    return f"{name}: {before!r} in the comparison, {now!r} now"
