"""Rows from files, what of them is learned, and batches.

Names are imported when they are first used: rows are read and checked without torch, which batches are made of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spectune.lazy_names import lazy_names

if TYPE_CHECKING:
    from spectune.data.batching import batches, by_length, collate, collate_packs, filled, pad_token_id, padded
    from spectune.data.bin_packing import best_fit, pack_step, places
    from spectune.data.data_report import DataReport
    from spectune.data.encoding import Encoded, encode, prompt_ids, prompts_ids
    from spectune.data.example import Example
    from spectune.data.head_labels import Labels, find_labels, task_type_of
    from spectune.data.labelled import LabelledExample
    from spectune.data.loading import HELD_OUT, Rows, load_rows, split_rows
    from spectune.data.mixing import Source, weight_changes
    from spectune.data.shapes import Row
    from spectune.data.weighting import mixture, weighted

#: file -> its names, as above; `tests/test_public_api.py` holds both together
_PUBLIC: dict[str, tuple[str, ...]] = {
    "spectune.data.batching": ("batches", "by_length", "collate", "collate_packs", "filled", "pad_token_id", "padded"),
    "spectune.data.bin_packing": ("best_fit", "pack_step", "places"),
    "spectune.data.data_report": ("DataReport",),
    "spectune.data.encoding": ("Encoded", "encode", "prompt_ids", "prompts_ids"),
    "spectune.data.example": ("Example",),
    "spectune.data.labelled": ("LabelledExample",),
    "spectune.data.head_labels": ("Labels", "find_labels", "task_type_of"),
    "spectune.data.loading": ("HELD_OUT", "Rows", "load_rows", "split_rows"),
    "spectune.data.mixing": ("Source", "weight_changes"),
    "spectune.data.shapes": ("Row",),
    "spectune.data.weighting": ("mixture", "weighted"),
}

__all__ = [
    "HELD_OUT", "DataReport", "Encoded", "Example", "LabelledExample", "Labels", "Row", "Rows", "Source", "batches",
    "best_fit", "by_length", "collate", "collate_packs", "encode", "filled", "find_labels", "load_rows", "mixture",
    "pack_step", "pad_token_id", "padded", "places", "prompt_ids", "prompts_ids", "split_rows", "task_type_of",
    "weight_changes", "weighted",
]  # fmt: skip

if not TYPE_CHECKING:  # a type checker would take any name for one that is there
    __getattr__ = lazy_names(__name__, _PUBLIC)
