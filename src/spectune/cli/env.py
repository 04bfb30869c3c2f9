"""`spectune env`: what a report of a problem should hold."""

import os
import platform
import sys
from typing import Any

from spectune.cli import options
from spectune.cli.console import print_answer, say, work
from spectune.version import __version__, installed_version

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "pyarrow", "pydantic", "numpy", "scipy")
VARIABLES = (
    "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "OMP_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
)  # fmt: skip


def env(as_json: options.Json = False) -> None:
    """Print versions, devices, threads and the methods that are installed.

    \b
    Examples:
      spectune env
      spectune env --json > environment.json
    """
    with work(as_json=as_json) as out:
        found = _environment()
        if not as_json:
            for section, facts in found.items():
                say(out, section, style="bold")
                for name, value in facts.items():
                    say(out, f"  {name:<24} {'-' if value is None else value}")
    print_answer(found, as_json=as_json)


def _environment() -> dict[str, dict[str, Any]]:
    import torch

    from spectune.methods import METHODS

    devices: dict[str, Any] = {"cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    return {
        "versions": {
            "spectune": __version__,
            "python": f"{platform.python_version()} ({sys.executable})",
            "platform": platform.platform(),
            **{name: installed_version(name) for name in PACKAGES},
        },
        "devices": devices,
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "methods": {method.model_fields["name"].default: method.label for method in METHODS},
    }
