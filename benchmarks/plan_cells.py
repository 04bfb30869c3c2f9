"""The cells of `plan.py`, the most important first, and their predictions, from configs alone."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from shapes import CONFIGS
from transformers import PretrainedConfig

from spectune.blocks.execution import Execution, Packing
from spectune.compute.varlen import flash_by_document, loop_by_document
from spectune.data import Example, Row
from spectune.deltas import Method
from spectune.families import family_from_config
from spectune.methods import method_from_name
from spectune.planning import plan
from spectune.planning.flops import virtual_in_sequence
from spectune.training import TrainingConfig
from spectune.training.distribution import World
from spectune.training.prediction import shape_of
from spectune.training.step_batches import Batches

#: steps whose peak is measured: the optimizer's states are made at the end of the first
MEASURED_STEPS = 2
#: name -> config, rows, tokens of a row (less virtual ones where positions run out), and of a shorter one
SHAPES: dict[str, tuple[Callable[[], PretrainedConfig], int, int, int]] = {
    "Llama-3-8B": (CONFIGS["Llama-3-8B"], 4, 2048, 1024),
    "GPT-2 124M": (CONFIGS["GPT-2 124M"], 16, 1024, 512),
    "Llama 1B": (CONFIGS["Llama 1B"], 6, 2048, 1024),
    "Qwen3 4B": (CONFIGS["Qwen3 4B"], 4, 2048, 1024),
    "Gemma-3 1B": (CONFIGS["Gemma-3 1B"], 4, 2048, 1024),
    "OPT 1.3B": (CONFIGS["OPT 1.3B"], 6, 2048, 1024),
}
TINY: dict[str, tuple[Callable[[], PretrainedConfig], int, int, int]] = {
    "tiny gpt2": (CONFIGS["tiny gpt2"], 4, 128, 64),
    "tiny llama": (CONFIGS["tiny llama"], 4, 128, 64),
}
#: not looked at while the planner was made: other families, other kernels
UNSEEN = ("OPT 1.3B", "Gemma-3 1B")


@dataclass(frozen=True)
class Cell:
    """One thing to predict and to measure.

    Attributes:
        rows, length: of the batch, whole rows; "packed" and "padded" rows are shorter by their number.
        batch: "whole"; "labelled" (the last quarter of each row has a loss); "padded"; "packed" (documents of many
            lengths in one sequence).
        recorded: blocks are recorded as CUDA graphs, and replayed in the last of the steps.
    """

    shape: str
    method: str
    compiled: bool = False
    checkpointing: bool | str = False
    base_precision: str | None = None
    batch: str = "whole"
    optim: str = "adamw_torch_fused"
    short: bool = False
    recorded: bool = False

    @property
    def path(self) -> str:
        """What is special about it, in words."""
        parts = ["compiled" if self.compiled else "eager"]
        if self.recorded:
            parts.append("recorded")
        if self.checkpointing:
            parts.append({True: "every block"}.get(self.checkpointing, str(self.checkpointing)))  # type: ignore[call-overload]
        parts += [part for part in (self.base_precision, None if self.batch == "whole" else self.batch) if part]
        if self.optim != "adamw_torch_fused":
            parts.append(self.optim.removeprefix("adamw_"))
        return ", ".join(parts)


#: the order of all shapes' cells: all shapes have the first before any has the second
_ORDER: tuple[dict[str, Any], ...] = (
    {"method": "lora", "compiled": True},
    {"method": "lora", "compiled": True, "checkpointing": True},
    {"method": "lora"},
    {"method": "lora", "compiled": True, "base_precision": "fp8"},
    {"method": "lora", "compiled": True, "checkpointing": "selective"},
    {"method": "lora", "compiled": True, "checkpointing": "offload"},
    {"method": "lora", "compiled": True, "batch": "labelled"},
    {"method": "lora", "compiled": True, "batch": "packed"},
    {"method": "full", "compiled": True},
    {"method": "full"},
    {"method": "full", "optim": "adamw_8bit", "checkpointing": True},
    {"method": "full", "optim": "adamw_in_backward", "checkpointing": True},
    {"method": "bitfit", "compiled": True},
    {"method": "prefix", "compiled": True},
    {"method": "prompt", "compiled": True},
    {"method": "adapter", "compiled": True},
    {"method": "lora", "checkpointing": True},
    {"method": "lora", "checkpointing": "selective"},
    {"method": "lora", "checkpointing": "offload"},
    {"method": "lora", "base_precision": "fp8"},
    {"method": "lora", "batch": "packed"},
    {"method": "lora", "batch": "labelled"},
    {"method": "lora", "batch": "padded"},
    {"method": "prefix"},
    {"method": "prompt", "short": True},
    {"method": "bitfit", "short": True},
    {"method": "adapter", "checkpointing": True},
    {"method": "ia3", "compiled": True},
    {"method": "lora", "compiled": True, "base_precision": "int8"},
    {"method": "lora", "compiled": True, "base_precision": "nf4"},
    {"method": "dora", "compiled": True},
    {"method": "full", "checkpointing": True, "short": True},
    {"method": "lora", "compiled": True, "short": True},
    {"method": "lora", "compiled": True, "recorded": True},
    {"method": "lora", "recorded": True, "short": True},
    {"method": "full", "compiled": True, "recorded": True, "short": True},
)


def cells(shapes: list[str], methods: list[str] | None) -> list[Cell]:
    """All of them, the most important first."""
    chosen = [settings for settings in _ORDER if not methods or settings["method"] in methods]
    return [Cell(shape, **settings) for settings in chosen for shape in shapes]


@functools.cache
def config_of(shape: str) -> PretrainedConfig:
    return {**SHAPES, **TINY}[shape][0]()


def method_of(cell: Cell) -> Method:
    return method_from_name(cell.method)


def size_of(cell: Cell) -> tuple[int, int]:
    """Rows and tokens of the longest."""
    _, rows, long, short = {**SHAPES, **TINY}[cell.shape]
    length = short if cell.short else long
    room = getattr(config_of(cell.shape), "max_position_embeddings", None)
    return rows, length if room is None else min(length, room - method_of(cell).virtual_tokens)


def examples(cell: Cell) -> list[Example]:
    """The rows of its one batch."""
    rows, length = size_of(cell)
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, count in enumerate(_lengths(cell.batch, rows, length)):
        ids = torch.randint(0, config_of(cell.shape).vocab_size, (count,), generator=generator).tolist()
        prompt = 3 * count // 4 if cell.batch == "labelled" else 0
        found.append(Example(ids, prompt, Row(origin=f"row {number}", text="")))
    return found


def _lengths(batch: str, rows: int, length: int) -> list[int]:
    if batch == "packed":  # of many lengths, as many tokens in all as whole rows have at most
        return [max(2, length * (10 - number % 9) // 10) for number in range(rows)]
    return [length - (length // 4 if batch == "padded" and number else 0) for number in range(rows)]


def training_config(cell: Cell) -> TrainingConfig:
    return TrainingConfig(
        per_device_train_batch_size=size_of(cell)[0], gradient_checkpointing=cell.checkpointing, max_steps=8,
        torch_compile=cell.compiled, packing=cell.batch == "packed", optim=cell.optim, learning_rate=1e-6,
        max_grad_norm=0.0 if cell.optim == "adamw_in_backward" else 1.0,
    )  # fmt: skip


def packing_of(cell: Cell, device: str) -> Packing:
    """What `decide` comes to, without a model to ask."""
    if cell.batch != "packed":
        # all these bases are causal throughout and without experts: padding on their right is not told
        return Packing(mask_free=True)
    kernel = flash_by_document if device == "cuda" else None if cell.compiled else loop_by_document
    config = config_of(cell.shape)
    if any(getattr(config, name, 0.0) for name in ("attn_pdrop", "attention_dropout")):
        kernel = None  # dropout has masks made after all
    return Packing(True, kernel, virtual_in_sequence(method_of(cell), family_from_config(config)))


def shapes_of(cell: Cell, device: str) -> list[Any]:
    """What the planner is told of each batch of the step."""
    rows, how = examples(cell), packing_of(cell, device)
    window = [list(range(len(rows)))]
    batches = Batches(rows, training_config(cell), how, World()).of_step(window)
    return [shape_of([[rows[i] for i in pack] for pack in batch], how) for batch in batches]


def predict(cell: Cell, device: str) -> dict[str, Any]:
    """The cell, and its prediction or why there is none."""
    rows, length = size_of(cell)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = {**asdict(cell), "path": cell.path, "rows": rows, "length": length, "dtype": str(dtype)}
    begin = time.perf_counter()
    # on a CPU tensors are counted in steps that are not compiled, as `train` plans them
    compiled = cell.compiled and device != "cpu"
    try:
        config, method, shapes = config_of(cell.shape), method_of(cell), shapes_of(cell, device)
        whole = shape_of([[row] for row in examples(cell)], Packing(mask_free=packing_of(cell, device).mask_free))
        execution = Execution(compiled, cell.recorded and device == "cuda", cell.checkpointing)  # type: ignore[arg-type]
        estimate = plan(config, method, whole, execution=execution, dtype=dtype, base_precision=cell.base_precision,
                        optim=cell.optim, device=device)  # fmt: skip
        measured = estimate.of_steps([shapes] * MEASURED_STEPS)
    except Exception as error:
        return {**found, "skipped": f"{type(error).__name__}: {error}"[:300]}
    peaks = {"peak_allocated": measured.peak_allocated, "peak_reserved": measured.peak_reserved}
    return {
        **found, "plan_seconds": time.perf_counter() - begin, "predicted": {**estimate.to_dict(), **peaks},
        "planned_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "predicted_at": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }  # fmt: skip


def needed(prediction: dict[str, Any]) -> int:
    """Bytes of the device, the process's own among them."""
    predicted = prediction["predicted"]
    return int(max(predicted["peak_reserved"], predicted["peak_allocated"]) + predicted["context"])


def by_shape(found: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for shape in dict.fromkeys(cell["shape"] for cell in found):
        yield shape, [cell for cell in found if cell["shape"] == shape]
