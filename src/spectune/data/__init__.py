"""Rows from files, what of them is learned, and batches."""

from spectune.data.batches import batches, by_length, collate
from spectune.data.encode import DataReport, Encoded, Example, encode, prompt_ids, render_mask
from spectune.data.rows import HELD_OUT, Row, load_rows, split_rows

__all__ = [
    "HELD_OUT",
    "DataReport",
    "Encoded",
    "Example",
    "Row",
    "batches",
    "by_length",
    "collate",
    "encode",
    "load_rows",
    "prompt_ids",
    "render_mask",
    "split_rows",
]
