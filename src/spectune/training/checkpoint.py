"""Checkpoints: everything that k more steps depend on, so that k + k steps equal 2k bit for bit.

`checkpoint-N/` holds `delta.safetensors`, `best.safetensors`, `optimizer.safetensors`, the random state in
`random.safetensors`, and `state.json`, which is written last, sealed, and says what each of the others is. Nothing is
pickled. How one is read again: `spectune.training.restoring`.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spectune.deltas import Delta
from spectune.deltas.folder import CONFIG_FILE, OUR_FILE
from spectune.files.atomic import atomic_folder, remove_folder
from spectune.files.metadata import number_of, numbered, sealed
from spectune.files.strict_json import strict_json
from spectune.files.syncing import sync_folder
from spectune.files.tensor_file import write_tensors
from spectune.training.optimizer import MasterAdamW
from spectune.training.progress import Progress

KEPT = 2
PREFIX, BEST_PREFIX = "checkpoint-", "best-"
#: the link to the folder of the best weights
BEST = "best"
STATE_FILE, DELTA_FILE, BEST_FILE = "state.json", "delta.safetensors", "best.safetensors"
OPTIMIZER_FILE, RANDOM_FILE = "optimizer.safetensors", "random.safetensors"
TENSOR_FILES = (DELTA_FILE, BEST_FILE, OPTIMIZER_FILE, RANDOM_FILE)
#: of `state.json`; the first had no digests
FORMAT = 2
#: stands in `best/` beside the delta
TRAINING_FILE = "training.json"
#: of a fully tuned model
MODEL_CONFIG_FILE = "config.json"


def save_checkpoint(
    folder: Path, progress: Progress, delta: Delta, optimizer: MasterAdamW, best: Mapping[str, Tensor],
    identity: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Write `checkpoint-<step>/`, atomically, and remove all but it and the one before. Raises WriteError: the disk is
    full or broken; those before are as they were."""
    path = folder / f"{PREFIX}{progress.step}"
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    parts = (delta.training_state_dict(), best, optimizer.state_dict(), random)
    with atomic_folder(path, replaces=_is_ours) as temporary:
        named = zip(TENSOR_FILES, parts, strict=True)
        files = {name: write_tensors(temporary / name, part, handed_on=False) for name, part in named}
        state = {
            "format_version": FORMAT,
            "progress": asdict(progress),
            "identity": identity,
            "files": {name: digest.record() for name, digest in files.items()},
        }
        (temporary / STATE_FILE).write_text(strict_json(sealed(state)) + "\n", encoding="utf-8")
    drop_checkpoints(folder, progress.step)
    return path


def drop_checkpoints(folder: Path, step: int, *, later: bool = True) -> None:
    """Keep the two newest checkpoints up to a step. `later`: and remove those of later steps, which are damaged: else
    the run would have gone on from them."""
    found = numbered(folder, PREFIX)
    kept = [number for number, _ in found if number <= step][-KEPT:]
    for number, path in found:
        if number in kept or (number > step and not later):
            continue
        if path.is_dir() and all(_is_ours(path, entry) for entry in path.iterdir()):
            remove_folder(path)


def swap_best(
    folder: Path, delta: Delta, step: int, tokenizer: PreTrainedTokenizerBase, training: Mapping[str, Any]
) -> None:
    """Write the delta to `best-<step>/` and let the link `best` point there; the link is swapped in one move.

    Beside the delta's own files stands `training.json`: how rows became token ids (`training`), and `stored_bytes`, the
    size of the delta's config and weights: what `spectune.json` says of the base does not grow with the delta. A fully
    tuned model is a base itself and gets the tokenizer too. Raises WriteError: the disk is full or broken; what was the
    best before still is.
    """
    place = folder / f"{BEST_PREFIX}{step}"
    with atomic_folder(place, replaces=_is_best) as temporary:
        delta.save(temporary)
        size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file() and file.name != OUR_FILE)
        if delta.method.trains_base:
            tokenizer.save_pretrained(temporary)
        record = sealed({**training, "stored_bytes": size})
        (temporary / TRAINING_FILE).write_text(strict_json(record) + "\n", encoding="utf-8")
    _point(folder / BEST, place.name)
    for number, old in numbered(folder, BEST_PREFIX):
        if number != step and _is_best(old):
            remove_folder(old)


def drop_best(folder: Path) -> None:
    """Remove a link to best weights that are gone, and best weights that the link does not point to: a kill came
    between the two."""
    link = folder / BEST
    if link.is_symlink() and not link.exists():
        link.unlink()
    for _, old in numbered(folder, BEST_PREFIX):
        if link.exists() and not link.samefile(old) and _is_best(old):
            remove_folder(old)


def _point(link: Path, name: str) -> None:
    """Let a link point to a folder beside it, in one move."""
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(name, target_is_directory=True)
    if link.is_dir() and not link.is_symlink() and _is_best(link, of_step=False):
        remove_folder(link)  # the run's folder was copied by something that follows links
    os.replace(new, link)
    sync_folder(link.parent)  # before what it pointed to is removed


def _is_ours(checkpoint: Path, entry: Path) -> bool:
    """Whether a run wrote an entry of a checkpoint: one that went on from an earlier one may write it again, and remove
    it, damaged or not."""
    return entry.name in (STATE_FILE, *TENSOR_FILES)


def _is_best(best: Path, *_: Path, of_step: bool = True) -> bool:
    """Whether a run wrote the folder of its best weights, whatever has become of it."""
    if of_step and number_of(best.name, BEST_PREFIX) is None:
        return False
    return any((best / name).is_file() for name in (TRAINING_FILE, OUR_FILE, CONFIG_FILE, MODEL_CONFIG_FILE))
