"""Unsloth: its own model of LoRA, in the plain loop. It loads from a folder: the random base is saved once."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.step_speed.data import fill
from benchmarks.step_speed.grid import RefusedError
from benchmarks.step_speed.setting import Setting

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(setting: Setting) -> dict[str, Any]:
    """LoRA r=16, dropout 0, bias none, in bf16, with its checkpointing or none."""
    try:
        from unsloth import FastLanguageModel  # it patches others, and so comes before them
    except (ImportError, NotImplementedError) as error:
        raise RefusedError(f"unsloth does not import ({type(error).__name__}: {error})") from error
    from benchmarks.step_speed.peers import plain_loop

    model, _ = FastLanguageModel.from_pretrained(
        str(saved(setting)), max_seq_length=setting.length, dtype=setting.dtype, load_in_4bit=False
    )
    named = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", random_state=0,
        target_modules=LINEARS if named.issuperset(LINEARS) else "all-linear",
        use_gradient_checkpointing="unsloth" if setting.case.system.endswith("checkpointed") else False,
    )  # fmt: skip
    FastLanguageModel.for_training(model)
    fill((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return plain_loop(model, setting)


def saved(setting: Setting) -> Path:
    """The folder of the random base with a tokenizer; made at the first call, kept for the next processes."""
    from transformers import AutoTokenizer

    from spectune.embedded import MODEL_FOLDER

    room = Path(os.environ.get("STEP_SPEED_BASES", tempfile.gettempdir()))
    folder = room / f"step_speed-{setting.shape.model.replace(' ', '-')}-{setting.shape.dtype}"
    if not (folder / "complete").exists():
        model = setting.build()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODEL_FOLDER).save_pretrained(folder)
        (folder / "complete").touch()
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return folder
