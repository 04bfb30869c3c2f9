"""`plan`: the memory of a training step, from the config alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from spectune.blocks.execution import Execution
from spectune.blocks.recompute import Recomputation, modes
from spectune.deltas import Method
from spectune.errors import ConfigError
from spectune.planning.device_memory import free_memory
from spectune.planning.estimate import Estimate, Question
from spectune.planning.planner import Planner
from spectune.planning.shape import Shape
from spectune.planning.workload import Workload
from spectune.sizes import bytes_of

P = TypeVar("P")


def plan(
    base: str | Path | PretrainedConfig | PreTrainedModel,
    method: str | Method,
    batch: int | Shape = 8,
    length: int = 1024,
    *,
    validation: int | Shape | None = None,
    execution: Execution | None = None,
    dtype: str | torch.dtype | None = None,
    base_precision: str | None = None,
    gradient_checkpointing: Recomputation | Literal["auto"] | None = None,
    torch_compile: bool = False,
    cuda_graphs: bool = False,
    memory: int | str | None = None,
    optim: str = "adamw_torch_fused",
    gradient_accumulation_steps: int = 1,
    device: str | torch.device = "cuda",
    task_type: str | None = None,
    num_labels: int | None = None,
    trust_remote_code: bool = False,
) -> Estimate:
    """Bytes of one training step by term, and its peak. No weights are read or made, and no device is needed.

    Args:
        base: a hub id, a folder, "spectune-tiny", a config, or a loaded model.
        method: a config such as `LoRA(r=16)`, or a name.
        batch, length: rows, and tokens of each; a method's virtual tokens come on top. Or a batch's `Shape`.
        validation: rows of a validation batch that are as long as training's, or its `Shape`; None leaves it out.
        execution: how blocks run, instead of `torch_compile` and `cuda_graphs`.
        dtype: of the base; None is what `load` takes on that device, or the loaded model's own.
        base_precision: "fp8", "nf4", "int8", see `load`; None is the loaded model's own, else none.
        gradient_checkpointing: as in `TrainingConfig`; "auto": the first of none, "selective", True and "offload" that
            fits into `memory`, else the last; None is `execution`'s, else none.
        torch_compile: blocks are compiled; whether a run's are ("auto") follows from its length, unknown here.
        cuda_graphs: blocks are captured as CUDA graphs, where nothing is recomputed; with what those of one shape keep
            from step to step (`Estimate.recordings`).
        memory: bytes, or "24GiB", for "auto"; None is what is free on that device here, if that can be found out.
        optim: as in `TrainingConfig`.
        device: "cuda", "cpu" or "mps": which kernels run.
        task_type, num_labels, trust_remote_code: of a base that is not loaded, see `load`.

    Raises:
        ConfigError: a setting is wrong, the base has no room for that length, the method cannot act on this base, or
            block inputs are to go to host memory on another device than CUDA. DataError: there is no such base.
    """
    accumulates = gradient_accumulation_steps > 1
    workload = Workload.of(base, method, dtype, device, base_precision=base_precision, optim=optim,
                           accumulates=accumulates, task_type=task_type, num_labels=num_labels,
                           trust_remote_code=trust_remote_code)  # fmt: skip
    shape = batch if isinstance(batch, Shape) else Shape.whole(batch, length)
    execution = execution or Execution(torch_compile, cuda_graphs)
    mode = execution.recomputation if gradient_checkpointing is None else gradient_checkpointing

    def planned(mode: Recomputation) -> Estimate:
        return estimate(workload, shape, validation, replace(execution, recomputation=mode))

    possible = modes(mode, workload.device)
    if len(possible) > 1 and (free := free_memory(device) if memory is None else bytes_of(memory)) is not None:
        return cheapest_that_fits(possible, planned, lambda found: found.fits(free))
    return planned(possible[0])


def cheapest_that_fits(
    possible: Sequence[Recomputation], planned: Callable[[Recomputation], P], fits: Callable[[P], bool]
) -> P:
    """The first plan that fits, in the order of what may be done; the last one where none does."""
    for mode in possible:
        if fits(found := planned(mode)):
            break
    return found


def estimate(workload: Workload, shape: Shape, validation: int | Shape | None, execution: Execution) -> Estimate:
    """The plan of a batch, with its execution decided; see `plan`, also for the errors."""
    if shape.rows < 1 or shape.length < 2:
        raise ConfigError(f"batch = {shape.rows}, length = {shape.length}: at least 1 row of 2 tokens is needed")
    if execution.graphs and workload.device != "cuda":
        raise ConfigError(f"cuda_graphs = True on {workload.device}: CUDA graphs need a CUDA device, leave them out")
    workload.check_length(shape.length)
    return Question(Planner(workload, execution), shape, validation).answer()
