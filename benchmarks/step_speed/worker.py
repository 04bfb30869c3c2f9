"""One measurement in this process, written as JSON."""

from __future__ import annotations

import importlib
import json
import traceback
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from benchmarks.step_speed.grid import REAL_ROWS, SHAPES, TINY, Case, RefusedError, system
from benchmarks.step_speed.limit import flops_per_token
from benchmarks.step_speed.setting import Setting

from spectune.methods import BY_NAME

PACKAGES = ("torch", "transformers", "peft", "accelerate", "liger_kernel", "unsloth", "triton", "spectune")


def measure(case: Case, device: str, warmup: int, steps: int, rows: int | None = None) -> dict[str, Any]:
    """The case's line: what was measured, or `refused` (a system says that it cannot) or `failed` (it tried)."""
    shape = (SHAPES | TINY)[case.shape]
    real = case.system.startswith("real-")
    shape = replace(shape, rows=rows or (REAL_ROWS if real else shape.rows))
    setting = Setting(case, shape, torch.device(device), warmup, steps)
    line: dict[str, Any] = {
        "rows": setting.rows,
        "length": setting.length,
        "dtype": shape.dtype,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }
    try:
        facts = _module(case.system).run(setting)
    except RefusedError as error:
        return {**line, "refused": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {**line, "failed": f"{type(error).__name__}: {error}".strip()[:500]}
    if not facts["changed"]:
        return {**line, "failed": "no trained weight changed in any step"}
    if system(case.system).compiles and not setting.meter.found["graphs"]:
        return {**line, **setting.meter.found, "failed": "torch.compile made no graph"}
    flops = flops_per_token(
        setting.config, setting.length, facts["trained_parameters"], trains_base=BY_NAME[case.method].trains_base
    )
    if real:  # rows of many lengths, not all of them through the head: the formula is for another thing
        return {**line, **facts, **setting.meter.found}
    return {**line, **facts, **setting.meter.found, "flops_per_token": flops}


def _module(name: str) -> Any:
    """Where a system's `run` is."""
    if name.startswith("real-"):
        name = "real_data"
    elif name.startswith("ours"):
        name = "ours"
    elif name.startswith("unsloth"):
        name = "unsloth_peer"
    else:
        name = "trainer" if "trainer" in name else "peers"
    return importlib.import_module(f"benchmarks.step_speed.{name}")


def _version(name: str) -> str | None:
    if name == "spectune":
        import spectune

        return spectune.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main(order: dict[str, Any]) -> None:
    """What the driver sends: a case and how to measure it, and where its line goes."""
    case = Case(order["shape"], order["method"], order["system"])
    line = measure(case, order["device"], order["warmup"], order["steps"], order.get("rows"))
    Path(order["result"]).write_text(json.dumps(line), encoding="utf-8")
