"""AdamW in the backward pass: each weight is stepped as soon as its gradient is there, which then goes.

So no more gradients are there at once than backward has in flight: 14 bytes a weight of a bfloat16 base, not 16. What
needs all gradients at once is given up: clipping by their common norm, accumulation over batches, summing over
processes. Each weight's step is that of `MasterAdamW` without clipping, bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectune.errors import ConfigError
from spectune.training.config import TrainingConfig
from spectune.training.optimizer import MasterAdamW, set_rate


class InBackwardAdamW(MasterAdamW):
    """`MasterAdamW` that steps in hooks on the weights. To be closed when the run ends."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], config: TrainingConfig, learning_rate: float,
        factors: Sequence[float] = (),
    ) -> None:  # fmt: skip
        super().__init__(parameters, config, learning_rate, factors)
        self._inners = {id(m): self._adamw([index], config, learning_rate) for index, m in enumerate(self.masters)}
        self._norms: list[Tensor] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._stepping(index))  # type: ignore[no-untyped-call]
            for index, parameter in enumerate(self.parameters)
        ]

    def inner_of(self, master: Tensor) -> torch.optim.AdamW:
        return self._inners[id(master)]

    def begin(self, learning_rate: float) -> None:
        """The rate of the steps that the backward pass takes from now on."""
        self._norms.clear()
        for inner in self._inners.values():
            set_rate(inner, learning_rate)

    def step(self, learning_rate: float, max_grad_norm: float, loss: Tensor | None = None) -> Tensor:
        """All is done: the norm of the gradients that were stepped. Weights whose gradient was not finite were not.
        Raises ConfigError where gradients are to be clipped."""
        if max_grad_norm:
            raise ConfigError(f"optim=adamw_in_backward cannot clip gradients (max_grad_norm={max_grad_norm:g}): set 0")
        norms, self._norms = self._norms, []
        found: Tensor = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        return found

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _stepping(self, index: int) -> object:
        master = self.masters[index]
        inner = self.inner_of(master)

        @torch.no_grad()
        def step(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            self._norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
            # the fused kernel looks at this flag on the device, so that nothing waits for it
            inner.found_inf = (~self._norms[-1].isfinite()).float()  # type: ignore[attr-defined]
            if master is not parameter:
                master.grad = gradient.float()
                parameter.grad = None
            del gradient
            inner.step()
            master.grad = None
            if master is not parameter:
                parameter.copy_(master)

        return step
