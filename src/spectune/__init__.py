"""One toolkit for the whole fine-tuning spectrum: six methods, trained, measured side by side, saved as deltas.

    import spectune

    model, tokenizer = spectune.load("spectune-tiny")
    delta = spectune.attach(model, spectune.LoRA(r=16, lora_alpha=32), name="legal")

Names are imported when they are first used, so that `spectune --help` need not wait for torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from spectune.version import __version__

if TYPE_CHECKING:
    # isort: off
    from spectune.comparing import Arm as Arm, Comparison as Comparison, compare as compare
    from spectune.data import Source as Source
    from spectune.deltas import Delta as Delta, Method as Method, attach as attach, detach as detach, merge as merge
    from spectune.deltas import route as route
    from spectune.errors import ConfigError as ConfigError, DataError as DataError, DivergedError as DivergedError
    from spectune.errors import DoesNotFitError as DoesNotFitError, InterruptedRun as InterruptedRun
    from spectune.errors import OutOfMemoryError as OutOfMemoryError, SpectuneError as SpectuneError
    from spectune.methods import METHODS as METHODS, BitFit as BitFit, BottleneckAdapter as BottleneckAdapter
    from spectune.methods import FullFineTuning as FullFineTuning, LoRA as LoRA, PrefixTuning as PrefixTuning
    from spectune.methods import PromptTuning as PromptTuning, method_from_name as method_from_name
    from spectune.planning import Estimate as Estimate, plan as plan
    from spectune.results import RunResult as RunResult
    from spectune.storage import Bank as Bank, load as load, load_delta as load_delta
    from spectune.training import TrainingConfig as TrainingConfig, train as train
    # isort: on

# Before libraries read them: none of them tells anybody what is done here, unless the user has it so.
for _name, _value in {
    "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():  # fmt: skip
    os.environ.setdefault(_name, _value)

# room -> its public names; `tests/test_public_api.py` holds this table and the imports above together.
_PUBLIC: dict[str, tuple[str, ...]] = {
    "comparing": ("Arm", "Comparison", "compare"),
    "data": ("Source",),
    "deltas": ("Delta", "Method", "attach", "detach", "merge", "route"),
    "errors": ("ConfigError", "DataError", "DivergedError", "DoesNotFitError", "InterruptedRun", "OutOfMemoryError",
               "SpectuneError"),
    "methods": ("METHODS", "BitFit", "BottleneckAdapter", "FullFineTuning", "LoRA", "PrefixTuning", "PromptTuning",
                "method_from_name"),
    "planning": ("Estimate", "plan"),
    "results": ("RunResult",),
    "storage": ("Bank", "load", "load_delta"),
    "training": ("TrainingConfig", "train"),
}  # fmt: skip
_ROOM_OF = {name: room for room, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_ROOM_OF]


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name)
    if room is None:
        if not name[:1].isupper():  # a room, or what Python itself asks a module for; methods are classes
            raise AttributeError(f"module 'spectune' has no attribute {name!r}")
        # a method is public by standing in METHODS
        methods = importlib.import_module("spectune.methods").METHODS
        value = next((method for method in methods if method.__name__ == name), None)
        if value is None:
            raise AttributeError(f"module 'spectune' has no attribute {name!r}")
    else:
        value = getattr(importlib.import_module(f"spectune.{room}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
