"""Going on from a checkpoint: the newest that is whole. Nothing of the run is touched before one has proved to be."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from spectune.deltas.folder import check_tensors
from spectune.errors import ConfigError, DataError
from spectune.files.digests import Digest, check_files
from spectune.files.metadata import numbered, read_record
from spectune.files.weights import check_finite, read_headers, read_weights
from spectune.training.checkpoint import (
    BEST_FILE,
    DELTA_FILE,
    FORMAT,
    OPTIMIZER_FILE,
    PREFIX,
    RANDOM_FILE,
    STATE_FILE,
    TENSOR_FILES,
)
from spectune.training.identity import RecordedIdentity, check_identity
from spectune.training.progress import Progress
from spectune.training.run_state import RunState

log = logging.getLogger("spectune")

_DAMAGED = "The checkpoint is damaged"


class State(BaseModel):
    """What `state.json` holds. `files`: what the checkpoint's other files are; an earlier version did not say it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format_version: int = Field(default=1, ge=1)
    progress: Progress
    identity: RecordedIdentity
    files: dict[str, Digest] | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole, and fits the run: tensors by name, on the host."""

    path: Path
    progress: Progress
    delta: Mapping[str, Tensor]
    best: dict[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: Mapping[str, Tensor]

    def restore(self, run: RunState) -> None:
        """Put progress, weights, optimizer and random state into the run."""
        run.progress = self.progress
        run.delta.load_training_state_dict(self.delta)
        run.optimizer.load_state_dict(self.optimizer)
        torch.set_rng_state(self.random["cpu"])
        if "cuda" in self.random and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.random["cuda"])


def newest_whole(folder: Path, run: RunState, identity: Mapping[str, Any]) -> Saved | None:
    """The newest checkpoint that is whole; None where there are none. Those that are damaged are named in one warning,
    and stay until the run has passed them.

    Raises:
        OtherRunError: it is of a run with other settings, data or base.
        DataError: there are some, and all are damaged.
    """
    damaged: list[str] = []
    for number, path in reversed(numbered(folder, PREFIX)):
        try:
            found = read_checkpoint(path, number, run, identity)
        except DataError as error:
            damaged.append(f"{path.name}: " + "; ".join(str(error).splitlines()))
            continue
        if damaged:
            log.warning(
                "damaged, and not used:\n%s\nThe run goes on from %s, the newest that is whole.",
                "\n".join(damaged), found.path,
            )  # fmt: skip
        return found
    if damaged:
        raise DataError(
            f"{folder} has no checkpoint that is whole, and nothing was changed. Copy one of them again from where it "
            "was written; or remove all of them, and the run starts again",
            damaged,
        )
    return None


def check_same_step(steps: Sequence[int], folder: Path | None) -> None:
    """Raises ConfigError where processes, by rank, would go on from different checkpoints."""
    for rank, step in enumerate(steps):
        if step != steps[0]:
            raise ConfigError(
                f"process {rank} goes on from step {step}, process 0 from step {steps[0]}: {folder} has to be a folder "
                "that all processes see"
            )


def read_checkpoint(path: Path, number: int, run: RunState, identity: Mapping[str, Any]) -> Saved:
    """A checkpoint, looked at as a whole: its record, what that says of the other files, and their tensors' names,
    shapes and types, before any is read.

    Raises:
        OtherRunError: it is of a run with another identity.
        DataError: it is damaged.
    """
    state = read_record(path / STATE_FILE, State, what="the state of a run", again=_DAMAGED)
    if state is None:
        raise DataError(f"{path / STATE_FILE} is missing")
    if state.format_version > FORMAT:
        raise DataError(
            f"{path / STATE_FILE} has format_version {state.format_version}, and this version of spectune reads up to "
            f"{FORMAT}: install a newer one"
        )
    check_identity(state.identity, identity, path, "checkpoint")
    if problems := state.progress.problems(number, run.batches.steps_per_epoch, run.total_steps):
        raise DataError(f"{path / STATE_FILE} does not fit the run", problems)
    _check_tensors(path, run, state.progress)
    if state.files is not None:
        _check_digests(path, state.files)
    read = {name: read_weights([path / name]) for name in TENSOR_FILES}
    if state.files is None:
        own = {name: tensor.dtype for name, tensor in run.delta.training_state_dict().items()}
        for name in (DELTA_FILE, BEST_FILE):
            check_finite(read[name], own, str(path / name))
    random = read[RANDOM_FILE]
    _check_random(random, path / RANDOM_FILE)
    return Saved(path, state.progress, read[DELTA_FILE], read[BEST_FILE], read[OPTIMIZER_FILE], random)


def _check_digests(path: Path, files: Mapping[str, Digest]) -> None:
    if set(files) != set(TENSOR_FILES):
        raise DataError(f"{path / STATE_FILE} says what {', '.join(files)} are; expected {', '.join(TENSOR_FILES)}")
    check_files(path, files, _DAMAGED)


def _check_tensors(path: Path, run: RunState, progress: Progress) -> None:
    """By the files' headers alone. Raises DataError."""
    headers = {name: read_headers([path / name]) for name in TENSOR_FILES}
    own = run.delta.training_state_dict()
    for name in (DELTA_FILE, BEST_FILE):
        check_tensors(own, headers[name], str(path / name))
        other = [
            f"{key} is {headers[name][key].dtype}" for key, t in own.items() if headers[name][key].dtype != t.dtype
        ]
        if other:
            raise DataError(f"{path / name} does not hold what was trained", other)
    try:
        run.optimizer.check_state(headers[OPTIMIZER_FILE])
    except DataError as error:
        raise DataError(f"{path / OPTIMIZER_FILE}: {error}") from error
    if progress.step and not any(key.endswith(".step") for key in headers[OPTIMIZER_FILE]):
        raise DataError(f"{path / OPTIMIZER_FILE} has the state of no weight, and the run has taken steps")
    expected = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        expected["cuda"] = torch.cuda.get_rng_state()
    found = headers[RANDOM_FILE]
    problems = [f"{key} is missing" for key in ("cpu",) if key not in found]
    problems += [f"{key} is unknown" for key in found if key not in ("cpu", "cuda")]
    problems += [
        f"{key} is {list(t.shape)} {t.dtype}, expected {list(expected[key].shape)} {expected[key].dtype}"
        for key, t in found.items()
        if key in expected and (t.shape, t.dtype) != (expected[key].shape, expected[key].dtype)
    ]
    if problems:
        raise DataError(f"{path / RANDOM_FILE} is no random state", problems)


def _check_random(random: Mapping[str, Tensor], path: Path) -> None:
    """Raises DataError where a generator does not take what was read."""
    for device, state in random.items():
        if device == "cpu" or torch.cuda.is_available():
            try:
                torch.Generator(device).set_state(state)
            except (RuntimeError, TypeError) as error:
                raise DataError(f"{path} is no random state of {device}: {error}") from error
