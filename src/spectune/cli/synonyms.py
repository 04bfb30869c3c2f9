"""What other toolkits call things that have another name here, and the nearest known name of a word."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

#: here -> there: names of transformers, PEFT, TRL, axolotl, LLaMA-Factory, and what people type
_ELSEWHERE = {
    "learning_rate": "lr base_lr",
    "num_train_epochs": "epochs epoch num_epochs n_epochs train_epochs max_epochs",
    "max_steps": "steps num_steps train_steps max_train_steps num_training_steps",
    "per_device_train_batch_size": "batch_size batch bs micro_batch_size train_batch_size per_gpu_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size val_batch_size valid_batch_size per_gpu_eval_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps gradient_accumulation accumulation_steps "
    "accumulate_grad_batches",
    "lr_scheduler_type": "lr_scheduler scheduler lr_schedule schedule",
    "warmup_steps": "warmup_ratio warmup num_warmup_steps",
    "optim": "optimizer optimiser",
    "weight_decay": "wd",
    "adam_beta1": "beta1 adam_beta_1",
    "adam_beta2": "beta2 adam_beta_2",
    "adam_epsilon": "eps epsilon adam_eps",
    "max_grad_norm": "grad_clip clip_grad gradient_clipping gradient_clip_val max_norm",
    "max_length": "cutoff_len cutoff_length max_seq_length max_seq_len seq_len seq_length sequence_len block_size "
    "model_max_length context_length",
    "train_on": "train_on_inputs train_on_turns mask_history roles_to_train",
    "columns": "column_mapping field_mapping dataset_text_field",
    "eval_steps": "evals_per_epoch evaluation_steps eval_every",
    "save_steps": "saves_per_epoch save_every checkpoint_every",
    "logging_steps": "log_steps log_every logging_every",
    "early_stopping_patience": "patience early_stopping early_stop",
    "load_best_at_end": "load_best_model_at_end load_best_model load_best",
    "packing": "sample_packing neat_packing pack",
    "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing recompute recomputation",
    "torch_compile": "compile use_compile",
    "report_to": "logger use_tensorboard log_with",
    "seed": "random_seed data_seed random_state",
    "resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "r": "rank lora_r lora_rank lora_dim",
    "lora_alpha": "alpha",
    "lora_dropout": "lora_drop",
    "dropout": "adapter_dropout",
    "target_modules": "lora_target lora_targets lora_target_modules lora_target_linear targets",
    "use_rslora": "rslora use_rs_lora peft_use_rslora",
    "num_virtual_tokens": "prefix_length prefix_len prompt_length prompt_len pre_seq_len num_tokens virtual_tokens",
    "encoder_hidden_size": "prefix_hidden_size prefix_dim",
    "bottleneck_dim": "bottleneck_size adapter_size adapter_dim bottleneck",
    "init": "prompt_tuning_init",
    "init_lora_weights": "lora_init pissa_init",
    "loraplus_lr_ratio": "loraplus_ratio lora_plus_ratio lorap_lr_ratio",
    "oft_block_size": "oft_block",
    "init_text": "prompt_tuning_init_text",
    "model": "base base_model model_name model_name_or_path model_id pretrained_model_name_or_path",
    "data": "dataset datasets dataset_name train_file train_data train_dataset data_path dataset_path train",
    "valid": "validation val validation_file valid_file val_file eval_file eval_dataset eval_data val_data dev",
    "test": "test_file test_data test_dataset test_datasets",
    "method": "adapter peft_type peft finetuning_type peft_method",
    "output_dir": "output out out_dir save_dir output_path",
    "dtype": "torch_dtype bf16 fp16 precision",
    "base_precision": "load_in_4bit load_in_8bit quantization quantization_bit quantize",
    "max_new_tokens": "max_tokens max_output_tokens new_tokens",
    "do_sample": "sample sampling",
    "temperature": "temp",
    "run": "checkpoint adapter_path adapter_name_or_path lora_path lora_model_dir ckpt",
    "metric": "metrics metric_for_best_model",
    "as_json": "json_output",
    "skip_bad_rows": "skip_bad skip_invalid",
    "seeds": "num_seeds",
    "lora": "qlora pissa olora loraplus lora_plus",
    "ln": "layernorm layer_norm layernorm_tuning ln_tuning lntuning",
    "oft": "oftv2 qoft",
    "miss": "bone",
}  # fmt: skip
SYNONYMS = {there: here for here, words in _ELSEWHERE.items() for there in words.split()}
#: what to write, where the value is another one there
_HOW = {
    "warmup_ratio": "warmup_steps below 1 is a share of all steps",
    "bf16": "dtype=bfloat16",
    "fp16": "dtype=float16",
    "load_in_4bit": "base_precision=nf4",
    "load_in_8bit": "base_precision=int8",
    "qlora": "base_precision=nf4",
    "pissa": "init_lora_weights=pissa",
    "olora": "init_lora_weights=olora",
    "loraplus": "loraplus_lr_ratio=16",
    "train_on_inputs": "prompts are never learned; rows of `text` are learned whole",
    "evals_per_epoch": "eval_steps counts steps",
    "saves_per_epoch": "save_steps counts steps",
}  # fmt: skip


def meant(word: str, known: Collection[str]) -> str | None:
    """The known name that a word of another toolkit stands for, or that is written alike; None where none is."""
    plain = word.lower().replace("-", "_").strip("_")
    for name in (plain, SYNONYMS.get(plain)):
        if name in known:
            return name
    near = difflib.get_close_matches(plain, sorted(known), n=1, cutoff=0.7)
    return near[0] if near else None


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean ...?`, or all there is."""
    names = sorted(known)
    if (name := meant(word, names)) is not None:
        return f"did you mean {name!r}?" + how_to_write(word)
    return f"known are {', '.join(names)}"


def how_to_write(word: str) -> str:
    """` (dtype=bfloat16)`: what becomes of the value; empty where it stays as it is."""
    how = _HOW.get(word.lower().replace("-", "_"))
    return "" if how is None else f" ({how})"
