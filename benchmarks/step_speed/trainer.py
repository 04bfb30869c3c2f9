"""PEFT under transformers' Trainer, set up for speed: bf16, fused AdamW, nothing logged or saved."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from benchmarks.step_speed.data import RATE, RATES, Watched
from benchmarks.step_speed.grid import RefusedError
from benchmarks.step_speed.peers import peft_model
from benchmarks.step_speed.setting import Setting
from torch.utils.data import SequentialSampler
from transformers import Trainer as HFTrainer
from transformers import TrainerCallback, TrainingArguments


class _Trainer(HFTrainer):
    """Rows in their order, losses kept as tensors."""

    loss: torch.Tensor

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.loss = super().training_step(*args, **kwargs)
        return self.loss


class _Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self, setting: Setting) -> None:
        self.meter, self.trainer = setting.meter, None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.meter.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self.meter.step(self.trainer.loss)


def run(setting: Setting) -> dict[str, Any]:
    """Steps of `Trainer.train` under the setting's meter. Returns what is known of the trained weights."""
    checkpointed = setting.case.system.endswith("checkpointed")
    if checkpointed and setting.case.method == "prefix":
        raise RefusedError("transformers drops the cache under gradient checkpointing, and PEFT's prefix is a cache")
    model = peft_model(setting.build(), setting.case.method)
    trained = [p for p in model.parameters() if p.requires_grad]
    watched = Watched(trained)
    rows = [
        {"input_ids": row, "labels": label}
        for ids in setting.batches
        for row, label in zip(ids, setting.labelled(ids), strict=True)
    ]
    rows *= -(-setting.most_steps * setting.rows // len(rows))
    clock = _Clock(setting)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=setting.rows,
            max_steps=setting.most_steps,
            learning_rate=RATES.get(setting.case.method, RATE),
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            bf16=setting.dtype == torch.bfloat16,
            optim="adamw_torch_fused",
            gradient_checkpointing=checkpointed,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointed else None,
            use_cpu=setting.device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        if setting.case.method != "prefix":
            model.config.use_cache = False
        clock.trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
            callbacks=[clock],
        )
        clock.trainer.train()
    return {"trained_parameters": sum(p.numel() for p in trained), "changed": watched.changed()}
