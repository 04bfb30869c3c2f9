"""PEFT's folders: `adapter_config.json` and `adapter_model.safetensors` (those of Unsloth, axolotl, TRL and
LLaMA-Factory are PEFT's too)."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spectune.deltas import Method
from spectune.deltas.folder import CONFIG_FILE, WEIGHTS_FILE
from spectune.deltas.head_layout import without_head_key
from spectune.errors import DataError, SpectuneError, first_line
from spectune.families import Family
from spectune.files.weights import read_headers
from spectune.methods import METHODS
from spectune.storage.foreign.foreign_folder import ForeignFolder, Tensors
from spectune.storage.manifest import explain

_NAMES: tuple[type, ...] = (str, list)
#: the keys of PEFT's configs that are read here, and what they have to be: pydantic would take `true` for the number 1
_TYPES: dict[str, tuple[type, ...]] = {
    "peft_type": (str,),
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "bias": (str,),
    "init_lora_weights": (bool, str),
    "target_modules": _NAMES,
    "target_parameters": (list,),
    "exclude_modules": _NAMES,
    "feedforward_modules": _NAMES,
    "layers_pattern": _NAMES,
    "layers_to_transform": (int, list),
    "modules_to_save": (list,),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "num_virtual_tokens": (int,),
    "oft_block_size": (int,),
    "use_cayley_neumann": (bool,),
    "num_cayley_neumann_terms": (int,),
    "block_share": (bool,),
    "miss_dropout": (int, float),
    "mini_r": (int,),
    "init_weights": (bool, str),
}
#: lists whose entries are numbers
_NUMBERS = ("layers_to_transform",)


def peft_method(folder: Path, config: dict[str, Any]) -> Method:
    """The method that a config of PEFT's describes, before its tensors are known. Raises DataError: it is damaged, or
    uses what is not read here; everything wrong is listed."""
    path = folder / CONFIG_FILE
    problems = _wrong_types(config)
    if problems:
        raise DataError(f"{path} is not what PEFT writes", problems)
    bare = without_head_key(config)
    try:
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
    raise DataError(
        f"{path}: peft_type {config.get('peft_type')!r} is not a method of spectune's. Where PEFT merges it, "
        "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(...) makes a base of it; or train "
        "one of spectune's on the same rows."
    )


def fit_peft(folder: Path, config: dict[str, Any], method: Method, family: Family) -> ForeignFolder:
    """The folder on one base: where its tensors say that it acts. Raises DataError: they are for places that the base
    has not, or are damaged."""
    path = folder / CONFIG_FILE
    headers = read_headers([folder / WEIGHTS_FILE])
    try:
        fitted = method.fitted_to(without_head_key(config), headers, family)
    except SpectuneError as error:
        raise DataError(f"{path} and {WEIGHTS_FILE} beside it do not fit this base: {error}") from error
    except Exception as error:  # patterns that are none, values that PEFT never writes
        raise DataError(f"{path} cannot be read ({first_line(error)}); expected what PEFT writes") from error

    def taken_in(tensors: Tensors) -> dict[str, Any]:
        return {name: tensor for name, tensor in tensors.items() if name not in fitted.left_out}

    return ForeignFolder(fitted.method, translate=taken_in, said=fitted.said)


def _wrong_types(config: dict[str, Any]) -> list[str]:
    problems = []
    for key, types in _TYPES.items():
        value = config.get(key)
        right = isinstance(value, types) and (not isinstance(value, bool) or bool in types)
        item = int if key in _NUMBERS else str
        if isinstance(value, list) and right:
            right = all(isinstance(entry, item) for entry in value)
        if value is not None and not right:
            words = "a list of numbers" if item is int else "a list of texts"
            expected = " or ".join(words if kind is list else kind.__name__ for kind in types)
            problems.append(f"{key} = {repr(value)[:80]}: expected {expected}")
    return problems
