"""Reading files that anybody may have written: safetensors only, checked before anything is allocated or attached.

Nothing is ever unpickled. A file is opened only where it is a regular file inside its folder: a pipe would hang, a link
out of the folder would read what the folder does not hold.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from spectune.errors import DataError
from spectune.files.regular import plain_file

#: what weights may be stored as; anything narrower (float8) has lost what a delta needs, integers are no weights
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_COPY = "copy the folder again from where it was written"


def need_weights(path: Path) -> Path:
    """Return `path` if the file exists. Raises DataError otherwise, which names pickles that are there instead."""
    if plain_file(path):
        return path
    pickles = sorted(found.name for kind in _PICKLES for found in path.parent.glob(kind))
    if pickles:
        raise DataError(
            f"{path} is missing; there is {', '.join(pickles)}, a pickle, which can run any code and is never read. "
            "Save the delta as safetensors where you trust it (PEFT: save_pretrained(folder, safe_serialization=True))."
        )
    raise DataError(f"{path} is missing: {path.parent} is not a delta's folder, or not a whole one; {_COPY}")


def read_headers(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Names, shapes and dtypes in safetensors files, as tensors on the meta device: no weight is read. Raises
    DataError: a file is missing, no regular file, damaged, or holds a name that another one holds too."""
    found: dict[str, Tensor] = {}
    for path in map(need_weights, paths):
        try:
            with safe_open(path, framework="pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                here = {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}
            unknown = [f"{name} is {kind}" for name, (_, kind) in here.items() if kind not in _DTYPES]
            metas = {n: torch.empty(s, dtype=_DTYPES[k], device="meta") for n, (s, k) in here.items() if k in _DTYPES}
        except Exception as error:  # the reader raises its own errors, torch others for sizes it cannot hold
            raise _damaged(path, error) from error
        twice = [f"{name} is in another file of the folder too" for name in metas if name in found]
        if unknown or twice:
            raise DataError(f"{path}: expected each tensor once, as float32, bfloat16 or float16", unknown + twice)
        found |= metas
    return found


def read_weights(paths: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files, on the CPU. Raises DataError where one is missing or damaged."""
    found: dict[str, Tensor] = {}
    for path in map(need_weights, paths):
        try:
            found |= load_file(path)
        except Exception as error:
            raise _damaged(path, error) from error
    return found


def check_finite(tensors: Mapping[str, Tensor], becomes: Mapping[str, torch.dtype], where: str) -> None:
    """Raise one DataError that lists every tensor with NaN or infinity in it, once cast to what it becomes."""
    problems = []
    for name, tensor in tensors.items():
        bad = tensor.numel() - int(torch.isfinite(tensor.to(becomes[name])).sum())
        if bad:
            problems.append(f"{name}: {bad} of {tensor.numel()} weights are not finite in {becomes[name]}")
    if problems:
        raise DataError(
            f"{where}: NaN or infinite weights, which make every answer NaN. The training diverged or the file is "
            "damaged: take an earlier checkpoint, or copy the folder again",
            problems,
        )


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not a readable safetensors file ({error}): it is damaged or of another kind; {_COPY}")
