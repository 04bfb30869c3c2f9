"""How a run is executed: what is compiled, captured and recomputed, and which attention kernel serves."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from typing import NamedTuple

from spectune.blocks.recompute import Recomputation
from spectune.deltas import Delta, Method
from spectune.errors import ConfigError
from spectune.families import Family
from spectune.planning.flops import flops_per_token
from spectune.training.config import TrainingConfig

#: that a layer takes on a GPU at least, forward and backward, however small it is: asking for its kernels
LAYER_SECONDS = 1.5e-3


class _Device(NamedTuple):
    """What compiling the blocks of a model takes and gives on a kind of device; see docs/performance.md.

    `compile_seconds`: what it takes, about. `saved`: the share of a step that it saves. `operations`: that training
    without the compiler reaches in a second (on a fast one: what is long there is long on any). `layer_seconds`: of
    forward and backward, at least, however small a layer is.
    """

    compile_seconds: float
    saved: float
    operations: float
    layer_seconds: float


_DEVICES = {"cuda": _Device(60.0, 0.2, 3e14, LAYER_SECONDS), "cpu": _Device(60.0, 0.1, 5e11, 0.0)}


def worth_compiling(family: Family, method: Method, *, tokens: int, steps: int, length: int, device_type: str) -> bool:
    """Whether a run is so long that compiling saves more time than it takes. Follows from the arguments alone, never
    from a clock: a run that goes on from a checkpoint decides as it did before.

    Args:
        tokens: of the whole run.
        length: of a row, on average.
    """
    device = _DEVICES.get(device_type)
    if device is None or (device_type == "cpu" and not _compiler_there()):
        return False
    computed = tokens * flops_per_token(family, method, max(1, length)) / device.operations
    eager_seconds = max(computed, steps * len(family.layers) * device.layer_seconds)
    return eager_seconds * device.saved > device.compile_seconds


def compiles(
    config: TrainingConfig, family: Family, method: Method, *, length: int, steps: int, device_type: str
) -> bool:
    """Whether the blocks of a run of so many steps are compiled: `config.torch_compile`, or what "auto" stands for.

    Args:
        length: of a row, on average.
    """
    if config.torch_compile != "auto":
        return config.torch_compile
    rows = steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    return worth_compiling(family, method, tokens=rows * length, steps=steps, length=length, device_type=device_type)


@functools.cache
def _compiler_there() -> bool:
    """Whether there is what torch's compiler needs on a CPU: a C++ compiler (asked of torch) and Python's headers."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler()) and Path(sysconfig.get_path("include"), "Python.h").exists()
    except (InvalidCxxCompiler, OSError):
        return False


#: what a GPU computes of a block's operations; what asking for its kernels takes is `LAYER_SECONDS`
OPERATIONS_PER_SECOND = 4e14


def launch_bound(family: Family, method: Method, *, tokens: int, length: int) -> bool:
    """Whether asking a GPU for a batch's kernels takes longer than running them, so that graphs pay.

    Args:
        tokens: of a batch, padding included.
        length: of a row.
    """
    operations = tokens * flops_per_token(family, method, max(1, length))
    return operations / OPERATIONS_PER_SECOND < len(family.layers) * LAYER_SECONDS


def records(
    config: TrainingConfig, delta: Delta, *, tokens: int, length: int, packs: bool, recomputation: Recomputation
) -> bool:
    """Whether a run's blocks are recorded: `config.cuda_graphs`, or what "auto" stands for.

    Args:
        tokens, length: see `launch_bound`.
        packs: rows share sequences: every batch has other documents, which a graph cannot follow.
        recomputation: blocks run again in backward, which a graph does not do.

    Raises:
        ConfigError: graphs are asked for, and cannot be.
    """
    return records_on(
        delta.model.device.type, config, delta.family, delta.method, tokens=tokens, length=length, packs=packs,
        recomputation=recomputation,
    )  # fmt: skip


def records_on(
    device: str,
    config: TrainingConfig,
    family: Family,
    method: Method,
    *,
    tokens: int,
    length: int,
    packs: bool,
    recomputation: Recomputation,
) -> bool:
    """`records` for a kind of device, which need not be there."""
    if config.cuda_graphs == "auto":
        possible = device == "cuda" and not packs and recomputation is False
        return possible and launch_bound(family, method, tokens=tokens, length=length)
    if not config.cuda_graphs:
        return False
    if device != "cuda":
        raise ConfigError(f"cuda_graphs=true needs a CUDA device, the model is on {device!r}: leave it at auto")
    if packs:
        raise ConfigError("cuda_graphs=true and packing: every pack has other documents. Set packing=false")
    if recomputation is not False:
        raise ConfigError(
            f"cuda_graphs=true and gradient_checkpointing={recomputation}: a recorded block keeps its activations. "
            "Set gradient_checkpointing=false, or leave cuda_graphs at auto"
        )
    return True
