"""Which attention kernel a run's steps take on CUDA: cuDNN's where it saves more than its plans take."""

from __future__ import annotations

from collections.abc import Sequence

from spectune.families import Family
from spectune.training.config import TrainingConfig

#: of cuDNN for a shape of batch that it has not met, forward and backward; see docs/performance.md
PLAN_SECONDS = 0.12
#: by which it is ahead of flash attention for each operation: 400 and 215 TFLOP/s on rows of 2,048 (H200)
_SAVED = 1 / 215e12 - 1 / 400e12
#: rows up to so many tokens gain nothing
_SHORT = 512


def takes_cudnn(family: Family, lengths: Sequence[int], steps: int, config: TrainingConfig, *, packs: bool) -> bool:
    """Follows from the arguments alone, so that a resumed run and a plan decide alike.

    Args:
        lengths: tokens of the training rows.
        steps: of the whole run.
        packs: rows share sequences; no two batches are alike then, and on CUDA another kernel attends.
    """
    shapes = len(set(lengths))
    if shapes == 1:
        return True
    mean = sum(lengths) / len(lengths)
    if packs or mean <= _SHORT:
        return False
    batches = steps * config.gradient_accumulation_steps
    # causal, forward and backward: 3.5 times two products of which a half is masked
    operations = 7 * mean * sum(attention.hidden_size for attention in family.attentions)
    saved = batches * config.per_device_train_batch_size * mean * operations * _SAVED
    return saved > min(shapes, batches) * PLAN_SECONDS
