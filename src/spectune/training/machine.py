"""Versions and machine, recorded with each result."""

import platform
from typing import Any

import torch

from spectune.version import __version__, installed_version

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "datasets", "numpy")


def environment() -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement."""
    return {
        "spectune": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := installed_version(name)) is not None},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
