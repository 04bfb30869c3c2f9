"""PEFT in a plain loop, with and without per-block compile and Liger; and full fine-tuning in a plain loop."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from benchmarks.step_speed.data import RATE, RATES, Watched, fill
from benchmarks.step_speed.grid import RefusedError
from benchmarks.step_speed.setting import Setting
from torch import nn

#: graphs that a peer may compile of one function before it gives up: PEFT's prefix needs one for each layer
MOST_GRAPHS = 256


def run(setting: Setting) -> dict[str, Any]:
    """PEFT or the bare base in `plain_loop`. Returns what is known of the trained weights."""
    system, full = setting.case.system, setting.case.method == "full"
    masters = system == "plain-masters"
    model = setting.build(torch.float32 if masters else None)
    if "liger" in system:
        apply_liger(model)
    if not full:
        model = peft_model(model, setting.case.method)
    if system.endswith("compiled"):
        compile_blocks(model)
    autocast = torch.autocast(setting.device.type, setting.dtype) if masters else contextlib.nullcontext()
    return plain_loop(model, setting, autocast)


def peft_model(model: Any, method: str) -> Any:
    """PEFT's own model of a method, with the sizes that spectune's methods have by default."""
    try:
        import peft
    except ImportError as error:
        raise RefusedError(f"peft is not installed ({error})") from error
    task = peft.TaskType.CAUSAL_LM
    lora = {"task_type": task, "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
    configs = {
        "lora": lambda: peft.LoraConfig(**lora),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "ia3": lambda: peft.IA3Config(task_type=task),
        "oft": lambda: peft.OFTConfig(task_type=task, oft_block_size=32, target_modules="all-linear"),
        "miss": lambda: peft.MissConfig(task_type=task, r=32, target_modules="all-linear"),
        "prefix": lambda: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=20),
        "prompt": lambda: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=20),
    }
    tuned = peft.get_peft_model(model, configs[method](), autocast_adapter_dtype=True)
    fill((name, p) for name, p in tuned.named_parameters() if p.requires_grad)
    return tuned


def blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The decoder layers: the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def compile_blocks(model: nn.Module) -> None:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = 4 * MOST_GRAPHS
    for block in blocks(model):
        block.compile()


def apply_liger(model: Any) -> None:
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise RefusedError(f"liger-kernel is not installed ({error})") from error
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise RefusedError(f"Liger has no kernels for {kind}")
    _apply_liger_kernel_to_instance(model=model)


def plain_loop(model: Any, setting: Setting, context: Any = None) -> dict[str, Any]:
    """The loop that everybody writes: no synchronise in it, no mask where nothing is padded."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    watched = Watched(trained)
    rate = RATES.get(setting.case.method, RATE)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    # PEFT's prefix is a cache of keys and values
    inputs: dict[str, Any] = {} if setting.case.method == "prefix" else {"use_cache": False}
    batches = [{"input_ids": ids, "labels": setting.labelled(ids)} for ids in setting.batches]
    setting.meter.begin()
    for batch in itertools.cycle(batches):
        placed = {name: tensor.to(setting.device, non_blocking=True) for name, tensor in batch.items()}
        with context or contextlib.nullcontext():
            loss = model(**placed, **inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if setting.meter.step(loss):
            break
    return {"trained_parameters": sum(p.numel() for p in trained), "changed": watched.changed()}
