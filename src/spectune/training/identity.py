"""What must be the same when a run goes on, or when it is taken for finished: `identity.json` and each checkpoint."""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel

from spectune.data import Encoded, weight_changes
from spectune.deltas import Method
from spectune.errors import ConfigError, DataError
from spectune.families import differences
from spectune.files.atomic import atomic_write_text
from spectune.files.metadata import read_record, sealed
from spectune.files.strict_json import strict_json
from spectune.storage.manifest import Base
from spectune.training.config import TrainingConfig

FILE = "identity.json"
#: settings that may change between a checkpoint and its resumption
FREE = {
    *("output_dir", "resume", "logging_steps", "save_steps", "report_to", "memory_check"),
    "task_type",  # the data and the labels tell it
    *("gradient_checkpointing", "cuda_graphs"),  # the numbers are the same, bit for bit where a step's are
}

#: rows of a step: may change between a checkpoint and its resumption where their product is the same
_OF_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")


class OtherRunError(ConfigError):
    """A folder holds a run with other settings, data or base than the one that is asked for."""


def identity_of(
    config: TrainingConfig, method: Method, *, learning_rate: float, max_length: int, encoded: tuple[Encoded, Encoded],
    base: Mapping[str, Any], dtype: str, base_precision: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Settings, method, data and base of a run, as JSON would give it back.

    Args:
        encoded: training and validation rows.
        base: the base's fingerprint, taken before training.
        dtype: what the base computes in, such as "float32".
        base_precision: what its frozen linears are stored in, where that is another thing.
    """
    train, valid = encoded
    found: dict[str, Any] = {
        **config.model_dump(mode="json", exclude=FREE),
        "learning_rate": learning_rate,
        "max_length": max_length,
        "method": method.model_dump(mode="json"),
        "weights": {name: found.weight for name, found in train.report.sources.items() if found.weight is not None},
        "data_sha256": hashlib.sha256(f"{train.sha256} {valid.sha256}".encode()).hexdigest(),
        "dtype": dtype,
        "base_precision": base_precision,
        "base": dict(base),
    }
    return dict(json.loads(json.dumps(found)))


class _Types(BaseModel):
    """What is more than compared of an identity that was read."""

    model_config = ConfigDict(strict=True, extra="allow")

    per_device_train_batch_size: Annotated[int, Field(ge=1)] | None = None
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] | None = None
    processes: Annotated[int, Field(ge=1)] | None = None
    weights: dict[str, float] | None = None
    method: dict[str, Any] | None = None
    template_date: Annotated[str, AfterValidator(datetime.date.fromisoformat)] | None = None
    base: dict[str, Any] | None = None


def _of_known_types(found: dict[str, Any]) -> dict[str, Any]:
    base = _Types.model_validate(found).base
    if base is not None and "parts" in base:  # an earlier version had other samples, which are not compared
        Base.model_validate(base)
    return found


#: as it was recorded
RecordedIdentity = Annotated[dict[str, Any], AfterValidator(_of_known_types)]


class _File(RootModel[RecordedIdentity]):
    """`identity.json`."""


def write_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write a run's `identity.json`, sealed and atomically."""
    atomic_write_text(folder / FILE, strict_json(sealed(identity)) + "\n")


def read_identity(folder: Path) -> dict[str, Any]:
    """The identity of the run in a folder. Raises DataError: there is none, or it is damaged."""
    path = folder / FILE
    again = "Without it nobody knows which settings, data and base the run there had: start in a new folder"
    found = read_record(path, _File, what="the identity of a run", again=again)
    if found is None:
        raise DataError(f"{path} is missing. {again}.")
    return found.root


def check_identity(recorded: Mapping[str, Any], wanted: Mapping[str, Any], place: Path, what: str) -> None:
    """Compare the identity of the run in `place` with the one that is asked for.

    Args:
        what: "checkpoint" or "finished run", for the message.

    Raises:
        OtherRunError: names every difference.
    """
    kept = [key for key in wanted if key not in _OF_STEP]
    changed = [line for key in kept for line in _changes(key, recorded.get(key), wanted[key], what)]
    if _rows_of_step(recorded)[0] != _rows_of_step(wanted)[0]:
        before, now = ("{} ({})".format(*_rows_of_step(identity)) for identity in (recorded, wanted))
        changed.append(f"rows of a step: {before} in the {what}, {now} now")
    if recorded.get("data_sha256") != wanted.get("data_sha256"):  # the same rows as often: the names of files are free
        changed += weight_changes(recorded.get("weights") or {}, wanted.get("weights") or {}, what)
    if changed:
        raise OtherRunError(
            f"{place} is of a run with other settings; go on with the same, or start in a new folder:\n"
            + "\n".join(changed)
        )


def check_alike(identities: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigError, or DataError where only the rows differ: not all processes, by rank, have the same run."""
    first = identities[0]
    for rank, other in enumerate(identities):
        found = {key: _changes(key, first.get(key), other[key], "run of process 0") for key in other}
        if changed := {key: lines for key, lines in found.items() if lines}:
            kind = DataError if set(changed) == {"data_sha256"} else ConfigError
            lines = "; ".join(line for lines in changed.values() for line in lines)
            raise kind(f"process {rank} has another run than process 0, and all have to have the same: {lines}")


def _rows_of_step(identity: Mapping[str, Any]) -> tuple[int, str]:
    """Their number, and how it comes about: 16, "8 x 1 on 2 processes"."""
    each, batches, processes = (int(identity.get(key) or 1) for key in _OF_STEP)
    where = f" on {processes} processes" if processes > 1 else ""
    return each * batches * processes, f"{each} x {batches}{where}"


def _changes(key: str, before: Any, now: Any, what: str) -> list[str]:
    if before == now or key == "weights":
        return []
    if key == "base" and before is not None:
        # not by equality: the same base in another precision, or quantised, has the same fingerprint nearly
        return [f"base: {line}" for line in differences(before, now)]
    if key == "data_sha256":
        return [f"data: other rows, or another tokenizer, than those of the {what} (compared by their token ids)"]
    if key == "method" and isinstance(before, dict):
        if before.get("name") != now["name"]:
            return [f"method: {before.get('name')!r} in the {what}, {now['name']!r} now"]
        return [line for field in now for line in _changes(f"method.{field}", before.get(field), now[field], what)]
    return [f"{key}: {before!r} in the {what}, {now!r} now"]
