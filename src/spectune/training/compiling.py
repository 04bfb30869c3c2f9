"""Compiled decoder blocks for as long as a run takes: each block is one graph, all blocks of a kind share it.

The whole model as one graph would take minutes to compile and gain little more; a block is compiled once for each kind
(twice where nothing below the first block is trained, whose input then needs no gradient). Deltas stand inside: their
hooks are part of the block's call.
"""

from __future__ import annotations

import contextlib
import functools
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import PreTrainedModel

from spectune.compute.compiler import CompiledCall, block_of, compiler_settings
from spectune.deltas import Method
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


@contextlib.contextmanager
def compiled(
    model: PreTrainedModel,
    family: Family,
    wanted: bool,
    *,
    backend: str | Callable[..., Any] = "inductor",
    memory_budget: float = 1.0,
) -> Iterator[None]:
    """Inside the `with`, run each decoder block compiled while gradients are wanted; leave the model as it was.

    Without gradients (validation, generation) blocks run as they are: their shapes vary, and they would be compiled
    once more.

    Args:
        wanted: False does nothing.
        backend: of `torch.compile`.
        memory_budget: 1 keeps what a product or attention gave and recomputes what is cheap (norms, activations,
            casts); below 1 the compiler recomputes products too, until a block keeps about that share of it. See
            `spectune.training.checkpointing.memory_budget`; `recomputing` is to be entered after this.
    """
    if not wanted:
        yield
        return
    run = torch.compile(block_of(), backend=backend)
    layers = [model.get_submodule(layer.path) for layer in family.layers]
    for layer in layers:
        layer.__dict__["_compiled_call_impl"] = _Compiled(layer, run, memory_budget)
    try:
        with compiler_settings(memory_budget):
            yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_compiled_call_impl", None)


class _Compiled(CompiledCall):
    """The call of one layer, compiled while gradients are wanted."""

    def __init__(self, layer: nn.Module, run: Callable[..., Any], memory_budget: float) -> None:
        self.layer, self.run, self.memory_budget = layer, run, memory_budget

    def compiles(self) -> bool:
        # where tensors are counted one by one (on a CPU, in the first steps), the compiler would give up for good
        return torch.is_grad_enabled() and _get_current_dispatch_mode() is None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiles():
            return self.run(self.layer, args, kwargs)
        return self.layer._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
