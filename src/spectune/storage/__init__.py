"""Bases and delta folders on disk."""

from spectune.deltas import attach, detach, merge, route  # with this room imported, what attach gives can save itself
from spectune.storage.atomic import atomic_folder, atomic_write_text
from spectune.storage.bases import TINY, load, load_config
from spectune.storage.delta_folder import load_delta, save_delta
from spectune.storage.devices import resolve_device, resolve_dtype

__all__ = [
    "TINY",
    "atomic_folder",
    "atomic_write_text",
    "attach",
    "detach",
    "load",
    "load_config",
    "load_delta",
    "merge",
    "resolve_device",
    "resolve_dtype",
    "route",
    "save_delta",
]
