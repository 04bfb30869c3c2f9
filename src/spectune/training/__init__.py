"""Training: the config, the only loop, optimizer, distribution, checkpoints.

Names are imported when they are first used: settings are checked without torch, which the loop is made of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spectune.lazy_names import lazy_names

if TYPE_CHECKING:
    from spectune.results.run_result import RunResult
    from spectune.training.config import TrainingConfig
    from spectune.training.machine import environment
    from spectune.training.together import Run, train_together
    from spectune.training.trainer import train

#: file -> its names, as above; `tests/test_public_api.py` holds both together
_PUBLIC: dict[str, tuple[str, ...]] = {
    "spectune.results.run_result": ("RunResult",),
    "spectune.training.config": ("TrainingConfig",),
    "spectune.training.machine": ("environment",),
    "spectune.training.together": ("Run", "train_together"),
    "spectune.training.trainer": ("train",),
}

__all__ = ["Run", "RunResult", "TrainingConfig", "environment", "train", "train_together"]

if not TYPE_CHECKING:  # a type checker would take any name for one that is there
    __getattr__ = lazy_names(__name__, _PUBLIC)
