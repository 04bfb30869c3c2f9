"""Bases and delta folders on disk.

Names are imported when they are first used: a config and a tokenizer are read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spectune.lazy_names import lazy_names

if TYPE_CHECKING:
    from spectune.deltas import base_name
    from spectune.files.atomic import atomic_folder, atomic_write_text
    from spectune.storage.bank import Bank
    from spectune.storage.base_precision import PRECISIONS, quantise_base
    from spectune.storage.bases import TINY, load
    from spectune.storage.delta_folder import load_delta, stored_method
    from spectune.storage.descriptions import load_config, load_tokenizer
    from spectune.storage.devices import resolve_device, resolve_dtype
    from spectune.storage.expectation import ExpectedAnswers, expected_answers, spread
    from spectune.storage.export import (
        check_format,
        copy_model,
        export_formats,
        write_model,
        write_peft,
        write_prompt_embeds,
    )
    from spectune.storage.export_proof import ExportProof, prove_export
    from spectune.storage.gguf_adapter import GgufProof, gguf_package, prove_gguf_lora, write_gguf_lora

#: file -> its names, as above; `tests/test_public_api.py` holds both together
_PUBLIC: dict[str, tuple[str, ...]] = {
    "spectune.deltas": ("base_name",),
    "spectune.files.atomic": ("atomic_folder", "atomic_write_text"),
    "spectune.storage.bank": ("Bank",),
    "spectune.storage.base_precision": ("PRECISIONS", "quantise_base"),
    "spectune.storage.bases": ("TINY", "load"),
    "spectune.storage.delta_folder": ("load_delta", "stored_method"),
    "spectune.storage.descriptions": ("load_config", "load_tokenizer"),
    "spectune.storage.devices": ("resolve_device", "resolve_dtype"),
    "spectune.storage.expectation": ("ExpectedAnswers", "expected_answers", "spread"),
    "spectune.storage.export": ("check_format", "copy_model", "export_formats", "write_model", "write_peft",
                                "write_prompt_embeds"),
    "spectune.storage.export_proof": ("ExportProof", "prove_export"),
    "spectune.storage.gguf_adapter": ("GgufProof", "gguf_package", "prove_gguf_lora", "write_gguf_lora"),
}  # fmt: skip

__all__ = [
    "PRECISIONS", "TINY", "Bank", "ExpectedAnswers", "ExportProof", "GgufProof", "atomic_folder", "atomic_write_text",
    "base_name", "check_format", "copy_model", "expected_answers", "export_formats", "gguf_package", "load",
    "load_config", "load_delta", "load_tokenizer", "prove_export", "prove_gguf_lora", "quantise_base",
    "resolve_device", "resolve_dtype", "spread", "stored_method", "write_gguf_lora", "write_model", "write_peft",
    "write_prompt_embeds",
]  # fmt: skip

if not TYPE_CHECKING:  # a type checker would take any name for one that is there
    __getattr__ = lazy_names(__name__, _PUBLIC)
