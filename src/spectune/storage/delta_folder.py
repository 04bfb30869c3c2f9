"""Delta folders: `adapter_config.json`, `adapter_model.safetensors`, and `spectune.json`, which PEFT never reads.

LoRA, prefix and prompt are written in PEFT's layout and read from it. Weights are safetensors only: nothing is ever
unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import spectune
from spectune.deltas import Delta, Method, Registry
from spectune.deltas.attach import place
from spectune.deltas.delta import CONFIG_FILE
from spectune.errors import DataError
from spectune.families import describe, differences, fingerprint
from spectune.methods import METHODS, method_from_dict
from spectune.storage.atomic import atomic_folder

FORMAT = 1
OUR_FILE = "spectune.json"


def save_delta(delta: Delta, folder: str | Path) -> Path:
    """Write `delta`'s folder, atomically; a folder that is there is replaced. Returns the folder."""
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        delta.write_files(temporary)
        ours = {
            "format": FORMAT,
            "method": delta.method.as_stored().model_dump(mode="json"),
            "trained_as": delta.method.model_dump(mode="json"),
            "base": delta.base_fingerprint,
            "base_name": str(delta.model.config._name_or_path),
            # what a reader of the weights must know: where the text's positions start
            "text_positions_start_at": delta.method.virtual_tokens,
            "parameters": delta.num_parameters(),
            "versions": {
                "spectune": spectune.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        (temporary / OUR_FILE).write_text(json.dumps(ours, indent=2) + "\n")
    return folder


Delta.writer = staticmethod(save_delta)


def load_delta(model: PreTrainedModel, folder: str | Path, name: str | None = None, trainable: bool = False) -> Delta:
    """Attach the delta stored in `folder` (ours or PEFT's) to `model` and make it the active one.

    Args:
        name: default is the folder's name.
        trainable: leave its weights open to training.

    Raises:
        DataError: no such folder, a damaged file, another base's fingerprint, missing, surplus or misshapen tensors
            (all at once). Nothing is attached then.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one that Delta.save or PEFT wrote")
    ours = _read_json(folder / OUR_FILE)
    if ours is not None:
        method = method_from_dict(ours["method"])
        registry = Registry.of(model)
        family = registry.family if registry else describe(model)
        apart = differences(ours["base"], fingerprint(model, family))
        if apart:
            raise DataError(f"{folder} was trained on another base ({ours['base_name']})", apart)
    else:
        method = _peft_method(folder)
    keep = {"keep_base": True} if method.trains_base else {}
    delta = place(model, method, name or folder.resolve().name, fill=lambda d: d.read_files(folder), **keep)
    for parameter in delta.parameters():
        parameter.requires_grad_(trainable)
    return delta


def _peft_method(folder: Path) -> Method:
    config = _read_json(folder / CONFIG_FILE)
    if config is None:
        raise DataError(f"{folder} has neither {OUR_FILE} nor {CONFIG_FILE}: it is not a delta's folder")
    for method in METHODS:
        found = method.from_peft_config(config)
        if found is not None:
            return found
    raise DataError(f"{folder / CONFIG_FILE}: peft_type {config.get('peft_type')!r} is not a method of spectune's")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}, expected an object")
    return content
