"""What all runs of a comparison share, and the folder of each: `conditions.json` and the keys of run folders."""

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from spectune.data import weight_changes
from spectune.errors import DataError
from spectune.families import differences
from spectune.files.digests import Digest
from spectune.files.metadata import first_problem, read_json, record_of
from spectune.results import Limits
from spectune.results.comparison_file import Conditions
from spectune.results.vouched import vouched_for
from spectune.storage.manifest import Base as BaseFingerprint
from spectune.training.identity import OtherRunError

FILE = "conditions.json"
#: no comparison has as many; each is looked for on disk
MOST_RUNS = 20_000
KEYS = {"base", "data", "settings", "preset", "environment", "scale", "arms", "limits", "identity"}


class RecordedConditions(Conditions):
    """What all runs of a comparison share, as `conditions.json` has it.

    Attributes:
        fingerprint: of the base; None in files of versions that took none.
        identity: what the runs' results depend on.
        metric_code: hashes of the user's metrics. No part of the identity: where they have changed, runs are judged
            again, and not trained again.
        limits: of the user, for the recommendation.
        files: what the files that no run has are, by path; see `spectune.results.vouched`.
    """

    fingerprint: Any = None
    identity: dict[str, Any] = Field(default_factory=dict)
    metric_code: list[str] | None = None
    limits: Limits = Field(default_factory=Limits)
    files: dict[str, Digest] = Field(default_factory=dict)


class _Identity(BaseModel):
    """What is more than compared of what was recorded."""

    model_config = ConfigDict(strict=True, extra="allow")

    max_length: Annotated[int, Field(ge=1)] | None = None
    template_date: Annotated[str, AfterValidator(datetime.date.fromisoformat)] | None = None
    passages_sha256: str | None = None
    data_sha256: str | None = None


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


def read(folder: Path, warn: Callable[[str], None] | None = None) -> RecordedConditions:
    """The conditions of the comparison in a folder. `warn` is told where they were changed after they were written; by
    default that is an error. Raises DataError where there are none, or damaged ones."""
    path = folder / FILE
    what, again = "the conditions of a comparison", "Expected the folder of `spectune compare`"
    content = read_json(path, what=what, again=again)
    lacking = "there is no such file" if content is None else f"it has no {', '.join(sorted(KEYS - set(content)))}"
    if content is None or KEYS - set(content):
        raise DataError(f"{path} cannot be read as {what}: {lacking}. {again}.")
    found = record_of(content, path, RecordedConditions, what=what, again=again, warn=warn)
    try:
        _Identity.model_validate(found.identity)
        if found.fingerprint is not None and "parts" in dict(found.fingerprint):  # earlier ones are not compared
            BaseFingerprint.model_validate(found.fingerprint)
    except (ValueError, TypeError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else "fingerprint: expected an object"
        raise DataError(f"{path} cannot be read as {what} ({problem}). {again}.") from error
    vouched_for(path, content)
    runs = len(found.arms) * len(found.preset.seeds) * (1 + len(found.preset.curve))
    if runs > MOST_RUNS:
        raise DataError(f"{path} cannot be read as {what}: it has {runs:,} runs, more than {MOST_RUNS:,}. {again}.")
    return found


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
