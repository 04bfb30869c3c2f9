"""Checkpoints: everything that k more steps depend on, so that k + k steps equal 2k bit for bit.

`checkpoint-N/` holds `delta.safetensors`, `best.safetensors`, `optimizer.safetensors`, `state.json` and the random
state in `random.safetensors`. Nothing is pickled.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spectune.deltas import Delta
from spectune.deltas.folder import OUR_FILE
from spectune.errors import ConfigError, DataError
from spectune.files.strict_json import strict_json
from spectune.storage import atomic_folder
from spectune.training.optimizer import MasterAdamW

KEPT = 2
#: stands in `best/` beside the delta
TRAINING_FILE = "training.json"


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    epoch: int = 0
    window: int = 0  # optimizer steps taken in this epoch
    epoch_loss: float = 0.0
    epoch_targets: int = 0
    tokens: int = 0
    targets: int = 0
    timed_tokens: int = 0
    timed_seconds: float = 0.0
    timed_cpu_seconds: float = 0.0
    seconds: float = 0.0
    last_epoch_loss: float | None = None
    base_valid_loss: float | None = None
    valid_loss: float | None = None
    valid_loss_by_source: dict[str, float] = field(default_factory=dict)
    best_loss: float | None = None
    best_loss_by_source: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    without_improvement: int = 0
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    seconds_by_phase: dict[str, float] = field(default_factory=dict)


def save_checkpoint(
    folder: Path, progress: Progress, delta: Delta, optimizer: MasterAdamW, best: dict[str, Tensor] | None,
    identity: dict[str, Any],
) -> Path:  # fmt: skip
    """Write `checkpoint-<step>/`, atomically, and remove all but the last two."""
    path = folder / f"checkpoint-{progress.step}"
    with atomic_folder(path, replaces=_is_ours) as temporary:
        _save(delta.training_state_dict(), temporary / "delta.safetensors")
        if best is not None:
            _save(best, temporary / "best.safetensors")
        _save(optimizer.state_dict(), temporary / "optimizer.safetensors")
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        _save(random, temporary / "random.safetensors")
        state = {"progress": asdict(progress), "identity": identity}
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    for old in _all(folder)[:-KEPT]:
        if _is_ours(old):
            shutil.rmtree(old)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder."""
    return next(reversed(_all(folder)), None)


def read_state(path: Path) -> tuple[Progress, dict[str, Any]]:
    """Progress and identity (settings and data) of a checkpoint. Raises DataError where it is damaged."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return Progress(**state["progress"]), state["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path / "state.json", error) from error


def check_same_step(steps: Sequence[int], folder: Path | None) -> None:
    """Raises ConfigError where processes, by rank, would go on from different checkpoints."""
    for rank, step in enumerate(steps):
        if step != steps[0]:
            raise ConfigError(
                f"process {rank} goes on from step {step}, process 0 from step {steps[0]}: {folder} has to be a folder "
                "that all processes see"
            )


def restore(path: Path, delta: Delta, optimizer: MasterAdamW) -> dict[str, Tensor] | None:
    """Put weights, optimizer and random state back; returns the best weights so far."""
    delta.load_training_state_dict(_load(path / "delta.safetensors"))
    optimizer.load_state_dict(_load(path / "optimizer.safetensors"))
    random = _load(path / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    best = path / "best.safetensors"
    return _load(best) if best.is_file() else None


def swap_best(
    folder: Path, delta: Delta, step: int, tokenizer: PreTrainedTokenizerBase, training: Mapping[str, Any]
) -> None:
    """Write the delta to `best-<step>/` and let the link `best` point there; the link is swapped in one move.

    Beside the delta's own files stands `training.json`: how rows became token ids (`training`), and `stored_bytes`, the
    size of the delta's config and weights: what `spectune.json` says of the base does not grow with the delta. A fully
    tuned model is a base itself and gets the tokenizer too.
    """
    place = folder / f"best-{step}"
    with atomic_folder(place, replaces=_is_best) as temporary:
        delta.save(temporary)
        size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file() and file.name != OUR_FILE)
        if delta.method.trains_base:
            tokenizer.save_pretrained(temporary)
        (temporary / TRAINING_FILE).write_text(strict_json({**training, "stored_bytes": size}) + "\n", encoding="utf-8")
    link = folder / f".best.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(place.name, target_is_directory=True)
    os.replace(link, folder / "best")
    for old in folder.glob("best-*"):
        if old != place and _is_best(old):
            shutil.rmtree(old)


def _is_ours(checkpoint: Path, *_: Path) -> bool:
    """Whether a run wrote a checkpoint: one that went on from an earlier one may write it again, and remove it."""
    return (checkpoint / "state.json").is_file() and (checkpoint / "delta.safetensors").is_file()


def _is_best(best: Path, *_: Path) -> bool:
    """Whether a run wrote the folder of its best weights."""
    return best.name.removeprefix("best-").isdigit() and (best / TRAINING_FILE).is_file()


def _all(folder: Path) -> list[Path]:
    numbered = {p: p.name.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*")}
    return sorted((p for p, n in numbered.items() if n.isdigit()), key=lambda p: int(numbered[p]))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read: {error}. Remove {path.parent} to go on from the one before.")
