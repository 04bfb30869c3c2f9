"""A delta's folder: `adapter_config.json`, `adapter_model.safetensors`, and `spectune.json`, which PEFT never reads."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from spectune.deltas.method import Method
from spectune.embedded import MODEL_FOLDER, NAME
from spectune.errors import DataError
from spectune.files.atomic import atomic_folder
from spectune.files.digests import Digest, digest_of
from spectune.files.metadata import content_sha256, read_json, sealed
from spectune.files.strict_json import strict_json
from spectune.files.weights import FLOATS
from spectune.version import __version__

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OUR_FILE = "spectune.json"
#: the keys of a base's name, in ours and in PEFT's config; they may be changed
BASE_NAME, _PEFT_BASE_NAME = "base_name", "base_model_name_or_path"
#: of `spectune.json`. Format 1 had another fingerprint of the base (`spectune.families.sample_differences`)
FORMAT = 2


class DeltaFiles(ABC):
    """How one delta's weights are written to a folder and read from it."""

    @abstractmethod
    def write(self, folder: Path) -> Mapping[str, Digest]:
        """Write config and weights into an existing folder, not atomically. Returns the digests of the weights, by the
        names of their files, as far as they are known from the writing."""

    @abstractmethod
    def weight_files(self, folder: Path) -> list[Path]:
        """The safetensors files of a folder that hold this delta."""

    @abstractmethod
    def check(self, folder: Path) -> None:
        """Check by their headers alone that a folder's files hold this delta; nothing is allocated. Raises DataError: a
        file is missing or damaged, or its tensors are not this delta's (all listed)."""

    @abstractmethod
    def read(self, folder: Path) -> None:
        """Load what `write` wrote (or PEFT) into this delta, whose method is the stored one. Raises DataError: a file
        is missing or damaged, its tensors are not this delta's, or some are not finite."""


def save_folder(
    folder: Path, method: Method, write: Callable[[Path], Mapping[str, Digest]],
    *, base: Mapping[str, Any], base_name: str, parameters: int,
) -> Path:  # fmt: skip
    """Write a delta's folder, atomically; one that an earlier save wrote is replaced. Returns the folder.

    Args:
        write: writes config and weights into a folder (`DeltaFiles.write`).
        base: the base's fingerprint.
        base_name: what the base was loaded as.
        parameters: weights that are stored.

    Raises:
        ConfigError: the folder holds files that no save of a delta wrote.
        WriteError: the disk is full, read-only or broken; the folder is as it was.
    """
    with atomic_folder(folder, replaces=_is_ours) as temporary:
        known = write(temporary)
        name_base(temporary / CONFIG_FILE, base_name)
        names = sorted(file.name for file in temporary.iterdir() if file.is_file())
        weights = [name for name in names if name.endswith(".safetensors")]
        others = [name for name in names if name not in weights and name != CONFIG_FILE]
        config = config_sha256(temporary / CONFIG_FILE)
        ours = {
            "format": FORMAT,
            "method": method.as_stored().model_dump(mode="json"),
            "trained_as": method.model_dump(mode="json"),
            "base": base,
            # what a reader of the weights must know: where the text's positions start
            "text_positions_start_at": method.virtual_tokens,
            "parameters": parameters,
            "versions": {"spectune": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
            "weights": {name: (known.get(name) or digest_of(temporary / name)).record() for name in weights},
            "digests": {name: digest_of(temporary / name).record() for name in others},
            **({"config_sha256": config} if config is not None else {}),
            # what a later save may replace
            "files": sorted({*names, OUR_FILE}),
        }
        named = {**sealed(ours), BASE_NAME: base_name}
        (temporary / OUR_FILE).write_text(strict_json(named) + "\n", encoding="utf-8")
    return folder


def config_sha256(config_file: Path) -> str | None:
    """What a config of PEFT's layout says, but for the name of its base: that is where it lies on this machine, and is
    changed where a folder is moved. None where there is no such file. Raises DataError: it is damaged."""
    config = read_json(config_file, any_integer=True)
    return None if config is None else content_sha256({k: v for k, v in config.items() if k != _PEFT_BASE_NAME})


def _is_ours(folder: Path, entry: Path) -> bool:
    """Whether a save wrote `entry`: what the folder itself says. Format 1 says it of weights only, and a model's has a
    config too."""
    try:
        if (ours := read_json(folder / OUR_FILE)) is None:
            return False
        weights = ours.get("weights", [WEIGHTS_FILE])
        configs = [CONFIG_FILE] if WEIGHTS_FILE in weights else ["config.json", "generation_config.json"]
        return entry.name in ours.get("files", [OUR_FILE, *weights, *configs])
    except (DataError, AttributeError, TypeError):  # not one of ours
        return False


def name_base(config_file: Path, name: str) -> None:
    """Write PEFT's key for the base into a config of PEFT's layout; any other config, or none, stays as it is."""
    config = read_json(config_file, any_integer=True)
    if config is not None and "peft_type" in config:
        config_file.write_text(json.dumps(config | {_PEFT_BASE_NAME: name}, indent=2) + "\n", encoding="utf-8")


def base_name(model: PreTrainedModel) -> str:
    """What the base was loaded as; the embedded one by its own name, which holds on every machine."""
    name = str(model.config._name_or_path)
    return NAME if name and Path(name) == Path(MODEL_FOLDER) else name


def check_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise one DataError that lists every missing, surplus and misshapen tensor."""
    problems = [f"missing: {name} {list(t.shape)}" for name, t in expected.items() if name not in given]
    problems += [f"surplus: {name} {list(t.shape)}" for name, t in given.items() if name not in expected]
    both = [(name, t, given[name]) for name, t in expected.items() if name in given]
    problems += [
        f"wrong shape: {name} is {list(found.shape)}, expected {list(t.shape)}"
        for name, t, found in both
        if found.shape != t.shape
    ]
    problems += [
        f"wrong type: {name} is {found.dtype}, expected float32, bfloat16, float16 or float64"
        for name, t, found in both
        if found.dtype not in (*FLOATS, t.dtype)
    ]
    if problems:
        raise DataError(f"{what}: the tensors do not fit", problems)
