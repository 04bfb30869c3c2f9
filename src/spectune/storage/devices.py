"""The one place where `--device` and `--dtype` are resolved."""

import torch

from spectune.errors import ConfigError
from spectune.torchrun import Place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda", "mps")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" is CUDA where there is one, else MPS, else the CPU; of several processes each has a CUDA device of its
    own. Raises ConfigError: an unknown name, or a device that this machine does not have."""
    if isinstance(device, torch.device):
        return device
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if has[name])
    kind = device.split(":")[0]
    if kind not in has:
        raise ConfigError(f"device {device!r} is unknown; expected one of {', '.join(DEVICES)}")
    if not has[kind]:
        raise ConfigError(f"device {device!r} is not available on this machine; use 'auto' or 'cpu'")
    return torch.device(device) if Place.from_environment().alone else _of_process(device, Place.from_environment())


def _of_process(device: str, place: Place) -> torch.device:
    kind, _, index = device.partition(":")
    if kind == "cuda" and index:
        raise ConfigError(f"device {device!r} is one, and torchrun started {place.size} processes: use 'cuda'")
    if kind == "mps":
        raise ConfigError(f"device 'mps' is one, and torchrun started {place.size} processes: use --device cpu")
    if kind == "cuda" and place.local_size > torch.cuda.device_count():
        raise ConfigError(
            f"torchrun started {place.local_size} processes on this machine, and it has {torch.cuda.device_count()} "
            "GPUs for them: start as many as there are GPUs (--nproc_per_node), or use --device cpu"
        )
    return torch.device(kind, place.local_rank) if kind == "cuda" else torch.device(kind)


def resolve_dtype(
    dtype: str | torch.dtype, device: torch.device, checkpoint_dtype: str | torch.dtype | None = None
) -> torch.dtype:
    """ "auto" is float32 on CPU and MPS; on CUDA the checkpoint's own type, but bfloat16 for a float16 checkpoint,
    whose gradients would need a loss scale. Raises ConfigError: an unknown name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is unknown; expected auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if isinstance(checkpoint_dtype, str):
        checkpoint_dtype = DTYPES.get(checkpoint_dtype.removeprefix("torch."))
    if device.type != "cuda" or checkpoint_dtype is None:
        return torch.float32
    return torch.bfloat16 if checkpoint_dtype == torch.float16 else checkpoint_dtype
