"""Training: the config, the only loop, optimizer, distribution, checkpoints."""

from spectune.results.run import RunResult
from spectune.training.config import TrainingConfig
from spectune.training.machine import environment
from spectune.training.trainer import train

__all__ = ["RunResult", "TrainingConfig", "environment", "train"]
