"""Rows from files, what of them is learned, and batches."""

from spectune.data.batching import batches, by_length, collate, collate_packs, filled, pad_token_id, padded
from spectune.data.bin_packing import best_fit, pack_step, places
from spectune.data.data_report import DataReport
from spectune.data.encoding import Encoded, encode, prompt_ids, prompts_ids
from spectune.data.example import Example
from spectune.data.loading import HELD_OUT, Rows, load_rows, split_rows
from spectune.data.mixing import Source, weight_changes
from spectune.data.shapes import Row
from spectune.data.weighting import mixture, weighted

__all__ = [
    "HELD_OUT", "DataReport", "Encoded", "Example", "Row", "Rows", "Source", "batches", "best_fit", "by_length",
    "collate", "collate_packs", "encode", "filled", "load_rows", "mixture", "pack_step", "pad_token_id", "padded",
    "places", "prompt_ids", "prompts_ids", "split_rows", "weight_changes", "weighted",
]  # fmt: skip
