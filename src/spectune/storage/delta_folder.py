"""Delta folders: `adapter_config.json`, `adapter_model.safetensors`, and `spectune.json`, which PEFT never reads.

LoRA, prefix and prompt are written in PEFT's layout and read from it. Weights are safetensors only: nothing is ever
unpickled. A folder may come from anybody: all of it is checked before the model is touched.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedModel

from spectune.deltas import Delta, Method, place, unplaced
from spectune.deltas.folder import CONFIG_FILE, OUR_FILE
from spectune.deltas.head_layout import without_head_key
from spectune.errors import DataError, SpectuneError, first_line
from spectune.families import differences
from spectune.methods import METHODS
from spectune.storage.manifest import Manifest, check_digests, explain, read_json, read_manifest

#: the keys of PEFT's configs that are read here, and what they have to be: pydantic would take `true` for the number 1
_PEFT_TYPES: dict[str, tuple[type, ...]] = {
    "peft_type": (str,),
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "bias": (str,),
    "target_modules": (str, list),
    "num_virtual_tokens": (int,),
}


def load_delta(model: PreTrainedModel, folder: str | Path, name: str | None = None, trainable: bool = False) -> Delta:
    """Attach the delta stored in `folder` (ours or PEFT's) to `model` and make it the active one.

    Args:
        name: default is the folder's name.
        trainable: leave its weights open to training.

    Raises:
        DataError: no such folder, a damaged file, another base's fingerprint, missing, surplus or misshapen tensors
            (all at once), weights that are not finite or not the ones that were saved. Nothing is attached then.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one that Delta.save or PEFT wrote")
    manifest, method = _described(folder)
    name = name or folder.resolve().name
    draft = unplaced(model, method, name)
    if manifest is not None:
        apart = differences(manifest.base.model_dump(), draft.base_fingerprint)
        if apart:
            raise DataError(f"{folder} was trained on another base ({manifest.base_name or 'of unknown name'})", apart)
    _check_files(draft, folder, OUR_FILE if manifest is not None else CONFIG_FILE)
    if manifest is not None:
        check_digests(manifest, draft.files.weight_files(folder))
    delta = place(model, method, name, fill=lambda d: d.files.read(folder), keep_base=method.trains_base)
    for parameter in delta.parameters():
        parameter.requires_grad_(trainable)
    return delta


def stored_method(folder: Path) -> Method:
    """The method of the delta stored in `folder` (ours or PEFT's); no weights are read. Raises DataError."""
    return _described(folder)[1]


def _described(folder: Path) -> tuple[Manifest | None, Method]:
    """What a folder says of itself: in our file, or else in PEFT's."""
    found = read_manifest(folder / OUR_FILE)
    return found if found is not None else (None, _peft_method(folder))


def _check_files(draft: Delta, folder: Path, config_file: str) -> None:
    """Check that the weights are what the config asks for, before any of either is made."""
    try:
        draft.files.check(folder)
    except SpectuneError as error:
        if str(folder) in str(error):
            raise
        raise DataError(f"{folder / config_file} and the weights beside it do not fit this base: {error}") from error
    except Exception as error:  # sizes past 64 bits, a broken regular expression: torch and re have errors of their own
        raise DataError(
            f"{folder / config_file} describes what cannot be built ({first_line(error)}); copy it again"
        ) from error


def _peft_method(folder: Path) -> Method:
    path = folder / CONFIG_FILE
    config = read_json(path)
    if config is None:
        raise DataError(f"{folder} has neither {OUR_FILE} nor {CONFIG_FILE}: it is not a delta's folder")
    if "spectune_method" in config:
        raise DataError(f"{folder / OUR_FILE} is missing; {path} alone does not describe this method: copy both")
    problems = _wrong_types(config)
    if problems:
        raise DataError(f"{path} is not what PEFT writes", problems)
    try:
        bare = without_head_key(config)
        for method in METHODS:
            found = method.from_peft_config(bare)
            if found is not None:
                return found
    except ValidationError as error:
        raise DataError(f"{path} has values that are refused", explain(error)) from None
    except KeyError as error:
        raise DataError(f"{path} has no key {error}, which peft_type {config['peft_type']!r} needs") from None
    except SpectuneError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # whatever else a method makes of values that PEFT never writes
        raise DataError(f"{path} cannot be read ({first_line(error)}); expected what PEFT writes") from error
    raise DataError(f"{path}: peft_type {config.get('peft_type')!r} is not a method of spectune's")


def _wrong_types(config: dict[str, Any]) -> list[str]:
    problems = []
    for key, types in _PEFT_TYPES.items():
        value = config.get(key)
        right = isinstance(value, types) and (not isinstance(value, bool) or bool in types)
        if isinstance(value, list) and right:
            right = all(isinstance(item, str) for item in value)
        if value is not None and not right:
            expected = " or ".join("a list of texts" if kind is list else kind.__name__ for kind in types)
            problems.append(f"{key} = {repr(value)[:80]}: expected {expected}")
    return problems
