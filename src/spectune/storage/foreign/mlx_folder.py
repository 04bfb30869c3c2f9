"""mlx-lm's folders: `adapter_config.json` with `fine_tune_type` and `lora_parameters`, and `adapters.safetensors`.

As mlx-lm's `tuner/lora.py` and `tuner/dora.py` have it: `y + scale (x a) b` with `lora_a` `[in, r]` and `lora_b`
`[r, out]`, and for DoRA the magnitude `m` `[out]`. Its modules are named as in the checkpoints of transformers, but for
what stands before the list of layers.
"""

import re
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError
from torch import Tensor

from spectune.deltas import Method, ends_with, same_targets
from spectune.deltas.folder import CONFIG_FILE
from spectune.deltas.peft_config import PREFIX
from spectune.errors import DataError
from spectune.families import Family
from spectune.files.weights import read_headers
from spectune.methods import BY_NAME
from spectune.storage.foreign.foreign_folder import ForeignFolder, Tensors
from spectune.storage.manifest import explain

MLX_WEIGHTS = "adapters.safetensors"
_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


def is_mlx(config: dict[str, Any]) -> bool:
    """Whether mlx-lm wrote a config."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def mlx_method(folder: Path, config: dict[str, Any]) -> Method:
    """The method that a config of mlx-lm's describes, before its tensors are known. Raises DataError: it trained whole
    layers, its scale cannot be told, or it is damaged."""
    path, kind = folder / CONFIG_FILE, config.get("fine_tune_type", "lora")
    if kind == "full":
        raise DataError(
            f"{path}: mlx-lm trained whole layers (fine_tune_type full), which is no delta. Write the whole model, "
            "mlx_lm.fuse --model BASE --adapter-path FOLDER, and load that as a base"
        )
    given = config.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(given, dict):
        raise DataError(
            f"{path} is not what mlx-lm writes: expected fine_tune_type lora, dora or full (it is {str(kind)[:40]!r}) "
            "and lora_parameters {rank, scale, dropout}"
        )
    rank, scale, alpha = given.get("rank"), given.get("scale"), given.get("alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not _number(scale):
        raise DataError(f"{path}: lora_parameters has rank {rank!r} and scale {scale!r}, expected two numbers")
    if alpha is not None and alpha != rank:
        raise DataError(
            f"{path}: lora_parameters has an alpha ({alpha!r}) beside its scale ({scale:g}): early versions of mlx-lm "
            f"scaled by scale * alpha / rank, later ones by scale alone. Take alpha out of the file, and set scale to "
            "what its training had"
        )
    dropout = given.get("dropout") or 0.0
    try:
        return BY_NAME[str(kind)].model_validate(
            {"name": kind, "r": rank, "lora_alpha": scale * rank, "lora_dropout": dropout}
        )
    except ValidationError as error:
        raise DataError(f"{path} has values that are refused", explain(error)) from None


def fit_mlx(folder: Path, method: Method, family: Family) -> ForeignFolder:
    """The folder on one base. Raises DataError: its tensors are no linears', or for places that the base has not."""
    headers = read_headers([folder / MLX_WEIGHTS])
    names = {name: _place(name, tensor, family) for name, tensor in headers.items()}
    problems = [f"{name} {list(headers[name].shape)}" for name, found in names.items() if found is None]
    if problems or not names:
        raise DataError(
            f"{folder / MLX_WEIGHTS} has tensors that are not lora_a, lora_b or m of a linear in a layer of this "
            f"{family.model_type} model (experts, embeddings, or of another model)",
            problems,
        )
    at = {found[0] for found in names.values() if found is not None}
    paths = [linear.path for linear in family.linears if linear.path in at]
    fitted = method.model_copy(update={"target_modules": same_targets("all-linear", paths, family)})

    def translate(tensors: Tensors) -> dict[str, Tensor]:
        made = {}
        for name, tensor in tensors.items():
            found = names[name]
            assert found is not None, "they are refused above"
            made[f"{PREFIX}{found[0]}.{_PARTS[found[1]]}"] = tensor if found[1] == "m" else tensor.T
        return made

    return ForeignFolder(fitted, MLX_WEIGHTS, translate)


def _place(name: str, tensor: Tensor, family: Family) -> tuple[str, str] | None:
    """The linear here that a tensor of mlx-lm's is for, and which part of the adapter it is."""
    path, _, part = name.rpartition(".")
    if part not in _PARTS or tensor.dim() != (1 if part == "m" else 2):
        return None
    if any(linear.path == path for linear in family.linears):
        return path, part
    inside = re.search(r"(?:^|\.)([A-Za-z_]+\.\d+\..*)", path)  # from the list of layers on
    here = [linear.path for linear in family.linears if inside and ends_with(linear.path, inside[1])]
    return (here[0], part) if len(here) == 1 else None


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
