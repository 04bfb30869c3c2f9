"""What PEFT's `adapter_config.json` says of where its adapters are, and which of its keys change what they compute.

PEFT 0.21: `tuners/tuners_utils.py` (`check_target_module_exists`), `tuners/lora/config.py`, `tuners/lora/layer.py`. Its
own tensors say where adapters are; the config only says which of them PEFT takes in.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spectune.deltas.target_names import ALL_LINEAR, Search, ends_with
from spectune.errors import DataError, some
from spectune.families import Family

PREFIX = "base_model.model."

#: of every method: what the base is, and what wrote the folder
_COMMON = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
           "task_type")  # fmt: skip
_PLACES = ("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules")
#: of LoRA: read, or what only training and the first weights depend on; other tools' keys of that kind too
_LORA_KNOWN = (
    *_COMMON, *_PLACES, "alpha_pattern", "bias", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "init_lora_weights", "loftq_config", "lora_alpha", "lora_dropout", "lora_dtype", "lora_ga_config", "lorap_emb_lr",
    "lorap_lr_ratio", "megatron_config", "megatron_core", "merge_weights", "qalora_group_size", "r", "rank_pattern",
    "runtime_config", "target_parameters", "use_dora", "use_rslora", "velora_config",
)  # fmt: skip
#: of LoRA: what changes the answers, and is not read
_LORA_BEYOND = (
    "alora_invocation_tokens", "arrow_config", "enable_lora", "kasa_config", "layer_replication", "lora_bias",
    "modules_to_save", "monteclora_config", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
_IA3_KNOWN = (*_COMMON, *_PLACES, "fan_in_fan_out", "feedforward_modules", "init_ia3_weights")
#: `init_lora_weights` that choose the first A and B and leave the base as it is
_PLAIN_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica", "lora_ga")
#: those that take a part of the base's weights out of it: LoRA makes them again from these weights, as PEFT does
_MADE_AGAIN = ("pissa", "olora")


@dataclass(frozen=True)
class Placed:
    """Where a PEFT folder's adapters are.

    Attributes:
        paths: linears that have one, in the model's order.
        left_out: tensors that PEFT does not take in, as its config says.
        said: a sentence on these, or None.
    """

    paths: tuple[str, ...]
    left_out: frozenset[str] = frozenset()
    said: str | None = None


def placed(config: Mapping[str, Any], tensors: Iterable[str], mark: str, family: Family) -> Placed:
    """Where PEFT has adapters: at the modules that tensors (by their names, `<module>.<mark>...`) are for and the
    config names. What the config names beside them has no weights, and acts as the base.

    Raises:
        DataError: the config names none of them; tensors are for modules that this base has not, or that are not
            adapted (all of them).
    """
    at: dict[str, list[str]] = {}
    for name in tensors:
        path, found, _ = name.removeprefix(PREFIX).partition(f".{mark}")
        if found:
            at.setdefault(path, []).append(name)
    if not at:
        raise DataError(
            f"it holds no tensor of {config.get('peft_type')}, named <module>.{mark}...: nothing is adapted"
        )
    search, linears = Search(), [linear.path for linear in family.linears]
    named = {path for path in at if _names(config, path, search, family)}
    if config.get("target_parameters"):  # what is named by its parameter is not judged here
        at = {path: names for path, names in at.items() if path in named and path in linears}
        named &= at.keys()
    elif not named:
        raise DataError(
            f"target_modules = {json.dumps(config.get('target_modules'))[:200]} and what else its config says of "
            f"places name none of the modules that its weights are for, such as {next(iter(at))}: PEFT does not load "
            "it either"
        )
    if foreign := sorted(named - set(linears)):
        raise DataError(
            f"it has weights for {len(foreign)} modules that are no linear in a layer of this {family.model_type}",
            [f"{path}: {_what(path, family)}" for path in foreign],
        )
    beside = [path for path in at if path not in named]
    bare = [path for path in linears if path not in at and _names(config, path, search, family)]
    said = [f"its config leaves out what it has weights for, as PEFT does: {some(beside)}"] if beside else []
    if bare and config.get("target_modules") is not None:
        said.append(
            f"it has no weights for {len(bare)} linears that its config names, which stay as they are: {some(bare)}"
        )
    return Placed(
        tuple(path for path in linears if path in named), frozenset(n for path in beside for n in at[path]),
        "; ".join(said) or None,
    )  # fmt: skip


def _names(config: Mapping[str, Any], path: str, search: Search, family: Family) -> bool:
    """Whether PEFT puts an adapter at a module."""
    excluded, wanted = config.get("exclude_modules"), config.get("target_modules")
    if excluded and (
        search.whole(excluded, path) if isinstance(excluded, str) else any(ends_with(path, name) for name in excluded)
    ):
        return False
    if any(search.whole(rf"(.*\.)?{name}(\..*)?", path) for name in config.get("modules_to_save") or ()):
        return False
    if wanted is None:  # PEFT has a table of its own for each type
        return True
    if isinstance(wanted, str):
        return path != family.head if wanted.lower() == ALL_LINEAR else search.whole(wanted, path)
    return any(ends_with(path, name) for name in wanted) and _layer_wanted(config, path, search)


def _layer_wanted(config: Mapping[str, Any], path: str, search: Search) -> bool:
    wanted, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or r"[^.]*"
    if wanted is None or wanted == []:
        return True
    # without a pattern something stands before the list, as PEFT has it
    before = r"(?:.*?\.)?" if config.get("layers_pattern") else r".*?\."
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        index = search.group(rf"{before}{pattern}\.(\d+)\..*", path)
        if index is not None:
            return int(index) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _what(path: str, family: Family) -> str:
    if path == family.head:
        return "the head, which LoRA is not trained at here"
    if path == family.embedding:
        return "the token embeddings, which LoRA is not trained at here"
    if any(other.path == path for other in family.others):
        return "outside of the text's layers, where nothing is adapted"
    return "there is no such linear"


def check_lora_keys(config: Mapping[str, Any]) -> str | None:
    """Check that a LoRA's config has nothing that would be lost here. Returns a sentence on its start, or None.

    Raises:
        DataError: a key that changes the answers, one that is not known, or a start that changed the base's weights.
    """
    used = [key for key in _LORA_BEYOND if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise DataError(
            f"this LoRA uses {', '.join(used)}, which spectune cannot load: its answers would not be the same"
        )
    _check_unknown(config, (*_LORA_KNOWN, *_LORA_BEYOND))
    start = str(config.get("init_lora_weights", True))
    if start.lower() not in (*_PLAIN_STARTS, *_MADE_AGAIN):
        raise DataError(_changed_base(start))
    if start.lower() == "lora_ga":
        return (
            "it was started with lora_ga, which moves a part of the base's weights into the adapter: its answers are "
            "those of its training only on the base that was saved with it"
        )
    return None


def check_ia3_keys(config: Mapping[str, Any]) -> None:
    """Check that an IA3's config has nothing that would be lost here. Raises DataError."""
    if config.get("modules_to_save"):
        raise DataError("this IA3 uses modules_to_save, which spectune cannot load: its answers would not be the same")
    _check_unknown(config, (*_IA3_KNOWN, "modules_to_save"))


def check_keys(
    config: Mapping[str, Any], what: str, known: Iterable[str], beyond: Iterable[str] = ("modules_to_save",)
) -> None:
    """Check that the config of a method of PEFT's has nothing that would be lost here.

    Args:
        what: the method, for messages.
        known: its keys that are read, or that only training and the first weights depend on.
        beyond: those that change the answers and are not read.

    Raises:
        DataError: such a key, a trained bias, or a key that is not known.
    """
    used = [key for key in beyond if config.get(key)] + ["bias"] * (config.get("bias", "none") != "none")
    if used:
        raise DataError(
            f"this {what} uses {', '.join(used)}, which spectune cannot load: its answers would not be the same"
        )
    _check_unknown(config, (*_COMMON, *_PLACES, *known, *beyond))


def _check_unknown(config: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = [f"{key} = {json.dumps(value)[:60]}" for key, value in config.items() if value and key not in known]
    if unknown:
        raise DataError(
            f"its config has what this version does not know: {', '.join(unknown)}. That may change its answers, so it "
            "is not ignored: take it out of the file where you know that it changes nothing"
        )


def _changed_base(start: str) -> str:
    kind = re.sub(r"_niter_\d+$", "", start.lower())
    if kind not in ("pissa", "olora", "corda", "loftq"):
        return f"init_lora_weights = {start!r} is not known: whether it changed the base's weights cannot be told"
    again = {
        "corda": "PEFT can make the change again only from the data it was made with",
        "loftq": "PEFT rounds the base's weights anew on loading",
    }.get(kind, "PEFT does that again whenever it loads the folder")
    return (
        f"init_lora_weights = {start!r} took a part of the base's weights into the adapter before training, and "
        f"{again}: on the base as it is, its answers would be wrong. Where it was trained, write it as plain LoRA of "
        "twice the rank: model.save_pretrained(folder, path_initial_model_for_weight_conversion=START), START being "
        "the adapter as it was saved before training. Or merge it with PEFT, PeftModel.from_pretrained(base, "
        "folder).merge_and_unload().save_pretrained(...), and load that as a base."
    )
