"""AdamW over float32 weights, and the learning rate of each step.

Weights of lower precision (full fine-tuning of a bfloat16 base) have float32 masters here: gradients are cast up,
results are cast down. Without them a small step rounds to none: pure bfloat16 training is why some published tables
have rows of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spectune.errors import DataError
from spectune.training.config import TrainingConfig


class MasterAdamW:
    """Fused AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); vectors have no weight decay."""

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainingConfig, learning_rate: float) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters: list[Tensor] = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_(True) for p in self.parameters
        ]
        groups = [
            {"params": [m for m in self.masters if m.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [m for m in self.masters if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self.inner = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip, step, clear the gradients. Returns the norm before clipping; a step with a norm that is not finite is
        not taken."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        norm = float(nn.utils.clip_grad_norm_(self.masters, max_grad_norm or math.inf))
        if math.isfinite(norm):
            for group in self.inner.param_groups:
                group["lr"] = learning_rate
            self.inner.step()
            with torch.no_grad():
                for parameter, master in zip(self.parameters, self.masters, strict=True):
                    if master is not parameter:
                        parameter.copy_(master)
        self.clear()
        return norm

    def clear(self) -> None:
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def tensors(self) -> list[Tensor]:
        """Everything it holds beside the parameters: masters and moments."""
        own = [m for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]
        return own + [t for state in self.inner.state.values() for t in state.values() if isinstance(t, Tensor)]

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, step counts and masters as flat tensors `<index>.<name>`, for safetensors."""
        found: dict[str, Tensor] = {}
        for index, (parameter, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
            if master is not parameter:
                found[f"{index}.master"] = master.detach()
            for name, value in self.inner.state.get(master, {}).items():
                found[f"{index}.{name}"] = value
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse. Raises DataError where the state is of other parameters."""
        for key, value in state.items():
            index, _, name = key.partition(".")
            if not index.isdigit() or int(index) >= len(self.masters):
                raise DataError(f"the optimizer's checkpoint has a state for parameter {key}, this run has none")
            master = self.masters[int(index)]
            if name == "master":
                with torch.no_grad():
                    master.copy_(value)
            else:
                place = value.device if name == "step" and master.device.type == "cpu" else master.device
                self.inner.state[master][name] = value.to(place, copy=True)


def learning_rate_at(step: int, total: int, peak: float, config: TrainingConfig) -> float:
    """The rate of optimizer step `step` (from 0) of `total`: linear warm-up, then linear or cosine to zero."""
    warmup = config.warmup_steps if config.warmup_steps >= 1 else round(config.warmup_steps * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    left = (total - step) / max(1.0, total - warmup)
    if config.lr_scheduler_type == "linear":
        return peak * left
    if config.lr_scheduler_type == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return peak
