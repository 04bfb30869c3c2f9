"""The optimizer of a run, by the setting `optim`."""

from collections.abc import Sequence

from torch import nn

from spectune.errors import ConfigError
from spectune.training.config import TrainingConfig
from spectune.training.eight_bit import EightBitAdamW
from spectune.training.in_backward import InBackwardAdamW
from spectune.training.optimizer import MasterAdamW

_CLASSES: dict[str, type[MasterAdamW]] = {
    "adamw_torch_fused": MasterAdamW,
    "adamw_8bit": EightBitAdamW,
    "adamw_in_backward": InBackwardAdamW,
}


def make_optimizer(
    parameters: Sequence[nn.Parameter], config: TrainingConfig, learning_rate: float, processes: int = 1,
    factors: Sequence[float] = (),
) -> MasterAdamW:  # fmt: skip
    """AdamW in the form that the config asks for. `factors`: of each parameter's rate (`DeltaModule.rate_factor`).
    Raises ConfigError for steps in backward with several processes, which sum their gradients after it."""
    if config.optim == "adamw_in_backward" and processes > 1:
        raise ConfigError(
            f"optim=adamw_in_backward steps before gradients are summed over processes, and there are {processes}: "
            "use adamw_torch_fused or adamw_8bit, or one process"
        )
    return _CLASSES[config.optim](parameters, config, learning_rate, factors)
