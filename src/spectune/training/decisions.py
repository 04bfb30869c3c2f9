"""How a run is to be executed: decided here, once, from what is the same whenever the same run is asked for."""

import functools
import logging
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from spectune.blocks.execution import Execution, Packing
from spectune.blocks.recompute import Recomputation, modes
from spectune.compute.pack_layout import Kernel
from spectune.compute.varlen import FLASH_DTYPES, flash_by_document, loop_by_document
from spectune.data import batches, by_length, pack_step, places
from spectune.deltas import (
    Delta,
    MatrixSite,
    Method,
    kernel_serves,
    route,
    why_mask_is_needed,
    why_not_cudnn,
    why_not_packed,
)
from spectune.errors import ConfigError
from spectune.families import Family
from spectune.methods import LoRA
from spectune.planning.flops import flops_per_token, virtual_in_sequence
from spectune.planning.workload import Workload
from spectune.sizes import duration
from spectune.training.batch_shapes import batch_shapes
from spectune.training.config import TrainingConfig
from spectune.training.prepare import Prepared, total_steps

log = logging.getLogger("spectune")

#: kernel-launch overhead of a layer on a GPU, forward and backward: a layer takes no less, however small it is
LAUNCH_SECONDS_PER_LAYER = 1.5e-3
#: what a GPU computes of a block's operations
OPERATIONS_PER_SECOND = 4e14
#: kind of device -> seconds that it takes to compile the blocks of a model, about; the share of a step that this saves;
#: the operations that training without it reaches in a second (on a fast device: what is long there is long on any).
#: See docs/performance.md: on an H200 3 to 26 s, and 8B packed rows at 11,197 tokens/s eagerly, 18,438 compiled
_COMPILING = {"cuda": (25.0, 0.3, 3e14), "cpu": (60.0, 0.1, 5e11)}
#: `packing="auto"` packs where that leaves out so much of the tokens that are computed: below it, a step's time changes
#: by less than it does from run to run, and each batch's shape would be another for it
WORTH = 0.1
#: steps of the first epoch that are looked at for it
_LOOKED_AT = 200
#: tokens of rows up to which compiled blocks have one graph for documents of any length. The kernel is started for
#: each document as if it were the longest: far beyond that, starting for nothing would cost more than another graph
ONE_GRAPH = 1024
#: of cuDNN for a shape of batch that it has not met, forward and backward; see docs/performance.md
PLAN_SECONDS = 0.12
#: by which it is ahead of flash attention for each operation: 400 and 215 TFLOP/s on rows of 2,048 (H200)
_SAVED = 1 / 215e12 - 1 / 400e12
#: entries of a config, not zero, with which no kernel attends but by masks
_MASKED_BY = ("attn_pdrop", "attention_dropout", "attn_dropout", "attn_logit_softcapping")
#: why blocks are left alone whose experts a delta changes
_SUMS = (
    "the blocks are not compiled: their graphs would make the changed weights of all experts, where the change is "
    "multiplied by itself otherwise (torch_compile=true does it)"
)
#: rows up to so many tokens gain nothing
_SHORT = 512


def decide(
    config: TrainingConfig, family: Family, method: Method, lengths: Sequence[int], device_type: str, *,
    steps: int | None, delta: Delta | None = None, workload: Workload | None = None,
) -> Execution:  # fmt: skip
    """How a run is executed. Follows from the arguments alone, never from a clock or what is free: a run that goes on
    from a checkpoint decides as it did before, and so does its plan. Recomputation is the first of what may be done
    (`possible_modes`); what memory asks for beyond it is decided by `spectune.training.prediction`.

    Args:
        lengths: tokens of the training rows; of one row as long as the longest where there are none yet.
        steps: optimizer steps of the whole run; None, where nobody says how many, is taken to be few.
        delta: the method attached to its model. Without it nothing is proved by running the model, and what only the
            model can tell is taken to be so.
        workload: without a delta, what is known of the base.

    Raises:
        ConfigError: a setting asks for what cannot be: packs on a model that cannot keep documents apart, CUDA graphs
            of another device, with packs or with recomputation, block inputs in host memory of another device.
    """
    length, rows = sum(lengths) // len(lengths), config.per_device_train_batch_size
    packing, why_packing = (
        _packing(config, family, lengths, device_type, delta)
        if delta is not None
        else _packing_unloaded(config, family, method, lengths, device_type, workload)
    )
    mode = possible_modes(config, device_type, None if delta is None else delta.model)[0]
    if config.cuda_graphs is True:
        check_graphs(device_type, packing.on, mode)
    graphs = bool(config.cuda_graphs)
    if config.cuda_graphs == "auto":
        possible = device_type == "cuda" and not packing.on and mode is False
        graphs = possible and launch_bound(family, method, tokens=rows * length, length=length)
    compiled, steps = config.torch_compile is True, steps or 0
    why_compiled = "the blocks are compiled in the first step, as torch_compile=true asks" if compiled else None
    if config.torch_compile == "auto":
        tokens = steps * rows * config.gradient_accumulation_steps * length
        gain = compiling_gain(family, method, tokens=tokens, steps=steps, length=length, device_type=device_type)
        compiled, why_compiled = gain is not None and gain.pays, None if gain is None or not steps else str(gain)
        if compiled and any(isinstance(site, MatrixSite) for site in method.sites(family)):
            compiled, why_compiled = False, _SUMS
    cudnn = has_cudnn(device_type) and takes_cudnn(family, lengths, steps, config, packs=packing.on)
    if cudnn and delta is not None:
        cudnn = _calls_suit_cudnn(delta, max(lengths))
    execution = Execution(compiled, graphs, mode, cudnn, packing).because("packing", why_packing)
    execution = execution.because("torch_compile", why_compiled)
    return _in_few_shapes(execution, lengths, config) if graphs else execution


def _in_few_shapes(execution: Execution, lengths: Sequence[int], config: TrainingConfig) -> Execution:
    """With batches of the few shapes that are captured, and a line on what that costs."""
    shapes = batch_shapes(lengths, config)
    packing = replace(execution.packing, lengths=shapes.lengths, rows=shapes.rows)
    said = f"{shapes.cost:.1%} more tokens than padded to the longest row of each"
    many = "one length" if len(shapes.lengths) == 1 else f"{len(shapes.lengths)} lengths"
    line = f"blocks are captured as CUDA graphs, for batches padded to {many} ({said})" if shapes.cost > 0 else None
    return replace(execution, packing=packing).because("cuda_graphs", line)


def decide_run(delta: Delta, prepared: Prepared, processes: int = 1, config: TrainingConfig | None = None) -> Execution:
    """How a run of an attached delta is executed, as far as memory has no say in it; raises as `decide`. With `config`:
    as if the run had these settings."""
    lengths, config = [example.length for example in prepared.examples], config or prepared.config
    steps = total_steps(len(lengths), config, processes)
    device_type = delta.model.device.type
    return decide(config, delta.family, delta.method, lengths, device_type, steps=steps, delta=delta)


def possible_modes(
    config: TrainingConfig, device_type: str, model: PreTrainedModel | None
) -> tuple[Recomputation, ...]:
    """What a run may recompute, in the order in which it is tried: what is wanted, or all for "auto". A model on which
    the user has switched transformers' own checkpointing on is recomputed at least block by block. Raises ConfigError
    for "offload" on a model that is not on a CUDA device."""
    wanted = config.gradient_checkpointing
    found = modes(wanted, device_type)
    if model is None or not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return found
    return found[found.index(True) :] if wanted == "auto" else (True,) if wanted is False else found


@dataclass(frozen=True)
class CompilingGain:
    """What compiling the blocks would do to a run, in seconds: what its steps take without, how much less they take
    with it, and how long it takes to compile."""

    steps: float
    saved: float
    wait: float

    @property
    def pays(self) -> bool:
        """Whether the run ends earlier."""
        return self.saved > self.wait

    def __str__(self) -> str:
        saves, wait = f"{duration(self.saved)} of about {duration(self.steps)} of steps", duration(self.wait)
        if self.pays:
            return f"the blocks are compiled in the first step: it takes about {wait}, and saves about {saves}"
        if self.steps < self.wait:
            saves = f"where the steps take about {duration(self.steps)}"
            return f"the blocks are not compiled: it would take about {wait}, {saves} (torch_compile=true does it)"
        return f"the blocks are not compiled: it would take about {wait} to save {saves} (torch_compile=true does it)"


def compiling_gain(
    family: Family, method: Method, *, tokens: int, steps: int, length: int, device_type: str
) -> CompilingGain | None:
    """What compiling does to a run of so many `tokens`, in rows of `length` on average; None where nothing compiles."""
    if device_type not in _COMPILING or (device_type == "cpu" and not has_cpu_compiler()):
        return None
    wait, saved, operations_per_second = _COMPILING[device_type]
    seconds = tokens * flops_per_token(family, method, max(1, length)) / operations_per_second
    if device_type == "cuda":
        seconds = max(seconds, steps * len(family.layers) * LAUNCH_SECONDS_PER_LAYER)
    return CompilingGain(seconds, seconds * saved, wait)


@functools.cache
def has_cpu_compiler() -> bool:
    """Whether there is what torch's compiler needs on a CPU: a C++ compiler (asked of torch) and Python's headers."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler()) and Path(sysconfig.get_path("include"), "Python.h").exists()
    except (InvalidCxxCompiler, OSError):
        return False


def launch_bound(family: Family, method: Method, *, tokens: int, length: int) -> bool:
    """Whether launching a batch's kernels on a GPU takes longer than running them, so that graphs pay. `tokens`: of the
    batch, padding included; `length`: of a row."""
    operations = tokens * flops_per_token(family, method, max(1, length))
    return operations / OPERATIONS_PER_SECOND < len(family.layers) * LAUNCH_SECONDS_PER_LAYER


def check_graphs(device_type: str, packs: bool, mode: Recomputation) -> None:
    """Raises ConfigError where blocks are to be captured as CUDA graphs and cannot be.

    Args:
        packs: rows share sequences: every batch has other documents, which a graph cannot follow.
        mode: what is recomputed: blocks run again in backward, which a graph does not do.
    """
    if device_type != "cuda":
        raise ConfigError(f"cuda_graphs=true needs a CUDA device, the model is on {device_type!r}: leave it at auto")
    if packs:
        raise ConfigError("cuda_graphs=true and packing: every pack has other documents. Set packing=false")
    if mode is not False:
        raise ConfigError(
            f"cuda_graphs=true and gradient_checkpointing={mode}: a captured block keeps its activations. "
            "Set gradient_checkpointing=false, or leave cuda_graphs at auto"
        )


def has_cudnn(device_type: str) -> bool:
    """Whether there may be kernels of cuDNN's on such a device."""
    return device_type == "cuda"


def takes_cudnn(family: Family, lengths: Sequence[int], steps: int, config: TrainingConfig, *, packs: bool) -> bool:
    """Whether a run's steps take cuDNN's attention on CUDA: where it saves more than its plans take. Steps that have a
    mask never do (`Execution.attention`), nor does a model that makes masks of its own (`why_not_cudnn`).

    Args:
        lengths: tokens of the training rows.
        steps: of the whole run.
        packs: rows share sequences; no two batches are alike then, and on CUDA another kernel attends.
    """
    shapes = len(set(lengths))
    if packs:
        return False
    if shapes == 1:
        return True
    mean = sum(lengths) / len(lengths)
    if mean <= _SHORT:
        return False
    batch_count = steps * config.gradient_accumulation_steps
    # causal, forward and backward: 3.5 times two products of which a half is masked
    operations = 7 * mean * sum(attention.hidden_size for attention in family.attentions)
    saved = batch_count * config.per_device_train_batch_size * mean * operations * _SAVED
    return saved > min(shapes, batch_count) * PLAN_SECONDS


def _packing(
    config: TrainingConfig, family: Family, lengths: Sequence[int], device_type: str, delta: Delta
) -> tuple[Packing, str | None]:
    """Whether this run packs, and a line on why. The same for the same rows, settings and model, so that a resumed run
    does as before; and whatever the seed and the method's virtual tokens, so that the runs of a comparison do alike.
    Raises ConfigError where `packing` is True and the model cannot keep documents apart."""
    padded = len(set(lengths)) > 1
    if not wants_packs(family, lengths, config, device_type):
        return Packing(mask_free=padded and needs_no_mask(delta)), None
    model, reason = delta.model, None
    virtual = virtual_in_sequence(delta.method, family)
    saved = share_saved(lengths, config, virtual)
    for kernel in kernels(device_type, model.dtype, compiled=config.torch_compile is True):
        with route(model, delta.name):
            reason = why_not_packed(model, kernel)
            serves = reason is None and (kernel is None or kernel_serves(model, kernel))
        if serves:
            how = "masks" if kernel is None else "attention document by document"
            found = Packing(True, kernel, virtual, min(max(lengths), ONE_GRAPH))
            return found, f"rows are packed ({how}): {saved:.0%} fewer tokens to compute than padded"
    if config.packing is True:
        raise ConfigError(f"packing is refused: {reason}. Leave it out (packing=false), or to spectune (packing=auto).")
    notice = f"note: rows are padded, not packed, which computes {saved:.0%} more tokens than need be: {reason}"
    return Packing(mask_free=padded and needs_no_mask(delta)), notice


def _packing_unloaded(
    config: TrainingConfig, family: Family, method: Method, lengths: Sequence[int], device_type: str,
    workload: Workload | None,
) -> tuple[Packing, str | None]:  # fmt: skip
    """The same of a base that is not loaded: its documents are taken to be kept apart, by the fastest kernel that its
    config has nothing against (as `kernel_serves` finds out by running it)."""
    if not wants_packs(family, lengths, config, device_type):
        return Packing(mask_free=len(set(lengths)) > 1 and not family.trained_head), None
    kernel = None
    if workload is not None and not _needs_masks(workload, family):
        kernel = kernels(device_type, workload.dtype, compiled=config.torch_compile is True)[0]
    packing = Packing(True, kernel, virtual_in_sequence(method, family), min(max(lengths), ONE_GRAPH))
    return packing, "rows are packed if the model keeps documents apart, which the run proves when it begins"


def _needs_masks(workload: Workload, family: Family) -> bool:
    """Whether attention within packs goes by masks, as the config has it: dropout, capped scores, or windows beside a
    prefix."""
    text = workload.config.get_text_config()
    method = workload.method
    windows = bool(family.sliding_window) and method.virtual_tokens > 0 and not virtual_in_sequence(method, family)
    return windows or any(getattr(text, name, None) for name in _MASKED_BY)


def wants_packs(family: Family, lengths: Sequence[int], config: TrainingConfig, device_type: str) -> bool:
    """`config.packing`, or whether "auto" would pack rows of these `lengths` in tokens on such a device, if the model
    can be given packs. The same for all methods."""
    if family.trained_head:  # what it says of a text belongs to a row
        if config.packing is True:
            raise ConfigError("packing=true: rows for a head are not packed. Leave it out (packing=auto)")
        return False
    if config.packing != "auto":
        return config.packing
    saved = share_saved(lengths, config)
    if saved < WORTH:
        return False
    mean = sum(lengths) / len(lengths)
    tokens = round(config.per_device_train_batch_size * mean / (1 - saved))
    # where kernels are launched more slowly than they run, fewer tokens make a step no shorter
    return device_type != "cuda" or not launch_bound(family, LoRA(), tokens=tokens, length=round(mean))


def needs_no_mask(delta: Delta) -> bool:
    """Whether rows padded on the right need no mask. It decides about the speed alone: only the log hears of it."""
    with route(delta.model, delta.name):
        reason = why_mask_is_needed(delta.model)
    if reason is not None:
        log.info("batches that are padded have an attention mask: %s", reason)
    return reason is None


def _calls_suit_cudnn(delta: Delta, length: int) -> bool:
    """Whether attention is called as cuDNN is known to be right for. It decides about the speed alone."""
    with route(delta.model, delta.name):
        reason = why_not_cudnn(delta.model, length)
    if reason is not None:
        log.info("cuDNN's attention is left out: %s", reason)
    return reason is None


def kernels(device_type: str, dtype: torch.dtype, *, compiled: bool = False) -> list[Kernel | None]:
    """Ways to attend within packs on such a device, the fastest first; None is by masks. On one CPU core a loop over
    documents was 1.1 to 1.35 times as fast as masks (docs/decisions.md); blocks that are `compiled` would get another
    graph for each batch from it."""
    if device_type == "cpu":
        return [None] if compiled else [loop_by_document, None]
    return [flash_by_document, None] if device_type == "cuda" and dtype in FLASH_DTYPES else [None]


def share_saved(lengths: Sequence[int], config: TrainingConfig, virtual: int = 0) -> float:
    """The share of the tokens of padded batches that short packs leave out, in some steps of an epoch in any order."""
    size = config.per_device_train_batch_size
    drawn, sizes = size * config.gradient_accumulation_steps, [length + virtual for length in lengths]
    steps = batches(lengths, drawn, seed=0, epoch=0, group_by_length=config.group_by_length)
    padded = in_packs = 0
    for rows in steps[:_LOOKED_AT]:
        padded += sum(places([[row] for row in batch], sizes) for batch in by_length(rows, lengths, size))
        in_packs += sum(places(batch, sizes) for batch in pack_step(rows, lengths, size, extra=virtual))
    return 1 - in_packs / padded
