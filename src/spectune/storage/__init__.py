"""Bases and delta folders on disk."""

from spectune.deltas import base_name
from spectune.files.atomic import atomic_folder, atomic_write_text
from spectune.storage.base_precision import PRECISIONS, quantise_base
from spectune.storage.bases import TINY, load, load_config, load_tokenizer
from spectune.storage.delta_folder import load_delta, stored_method
from spectune.storage.devices import resolve_device, resolve_dtype
from spectune.storage.export import (
    check_format,
    copy_model,
    export_formats,
    write_model,
    write_peft,
    write_prompt_embeds,
)

__all__ = [
    "PRECISIONS", "TINY", "atomic_folder", "atomic_write_text", "base_name", "check_format", "copy_model",
    "export_formats", "load", "load_config", "load_delta", "load_tokenizer", "quantise_base", "resolve_device",
    "resolve_dtype", "stored_method", "write_model", "write_peft", "write_prompt_embeds",
]  # fmt: skip
