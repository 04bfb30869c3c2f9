"""AdamW over float32 weights, and the learning rate of each step.

Weights of lower precision (full fine-tuning of a bfloat16 base) have float32 masters here: gradients are cast up,
results are cast down. Without them a small step rounds to none: pure bfloat16 training is why some published tables
have rows of zeros.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectune.errors import DataError
from spectune.planning.optimizer_memory import stepped_together
from spectune.training.config import TrainingConfig

#: of a tensor
Kind = tuple[torch.Size, torch.dtype]
_INDEX = re.compile("0|[1-9][0-9]{0,8}", re.ASCII)


class MasterAdamW:
    """Fused AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); vectors have no weight decay.

    Beside 2 bytes of a bfloat16 weight and 2 of its gradient it holds 12: master and two moments. In the step,
    gradients are cast in groups (`spectune.compute.step_groups`), each of which is stepped and cleared before the next
    is cast.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], config: TrainingConfig, learning_rate: float,
        factors: Sequence[float] = (),
    ) -> None:  # fmt: skip
        """`factors`: what the learning rate of each of the parameters is multiplied with; none is 1 for all."""
        self.parameters = [p for p in parameters if p.requires_grad]
        by_parameter = dict(zip(map(id, parameters), factors, strict=True)) if factors else {}
        self.factors = [by_parameter.get(id(p), 1.0) for p in self.parameters]
        self.masters: list[Tensor] = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_(True) for p in self.parameters
        ]
        #: weights that are stepped together, by number
        self.groups = stepped_together(self.parameters, config.optim)
        self.inner = self._adamw(range(len(self.masters)), config, learning_rate)
        #: what `joint_step` makes of weights and states once; anew where states were loaded
        self.known: Any = None

    def _adamw(self, members: Sequence[int], config: TrainingConfig, learning_rate: float) -> torch.optim.AdamW:
        """An optimizer of some masters, by number."""
        together: dict[tuple[bool, float], list[Tensor]] = {}
        for index in members:
            together.setdefault((self.masters[index].dim() > 1, self.factors[index]), []).append(self.masters[index])
        groups = [
            {"params": masters, "weight_decay": config.weight_decay if decays else 0.0, "factor": factor}
            for (decays, factor), masters in sorted(together.items(), key=lambda group: group[0], reverse=True)
        ]
        betas = config.adam_beta1, config.adam_beta2
        made = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)
        set_rate(made, learning_rate)
        return made

    def begin(self, learning_rate: float) -> None:
        """To be called before the backward pass of a step."""

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float, loss: Tensor | None = None) -> Tensor:
        """Clip by the norm of all gradients, step, clear the gradients.

        Nothing here waits for the device: whether norm and loss are finite is asked there, by the kernel that steps.

        Args:
            loss: the step's, a scalar; None asks for the norm alone.

        Returns:
            the norm before clipping, a float32 scalar on the device of the gradients. Where it or the loss is not
            finite the step was not taken.
        """
        gradients = self.take_gradients()
        norm = global_norm([gradient for gradient in gradients if gradient is not None])
        if norm is None:
            return torch.zeros(())
        set_rate(self.inner, learning_rate)
        finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
        self.inner.found_inf = (~finite).float()  # type: ignore[attr-defined]
        for members in self.groups:
            self._step(members, gradients, max_grad_norm or math.inf, norm)
        return norm

    def take_gradients(self) -> list[Tensor | None]:
        """The gradients, which the weights have no more: `inner` steps what has one."""
        found = [parameter.grad for parameter in self.parameters]
        self.clear()
        return found

    def _step(self, members: Sequence[int], gradients: list[Tensor | None], max_norm: float, norm: Tensor) -> None:
        """Cast, scale and step some weights, whose gradients are taken out of those of all; `norm` is that of all."""
        stepped = [index for index in members if gradients[index] is not None]
        for index in stepped:
            gradient, gradients[index] = gradients[index], None
            assert gradient is not None
            self.masters[index].grad = gradient.float()
            del gradient  # its memory is free before the next is cast
        if not stepped:
            return
        nn.utils.clip_grads_with_norm_([self.masters[index] for index in stepped], max_norm, norm)
        self.inner.step()
        copied = [index for index in stepped if self.masters[index] is not self.parameters[index]]
        if copied:
            torch._foreach_copy_([self.parameters[i] for i in copied], [self.masters[i] for i in copied])
        for index in stepped:
            self.masters[index].grad = None

    def close(self) -> None:
        """To be called when the run ends."""

    def inner_of(self, master: Tensor) -> torch.optim.Optimizer:
        """The optimizer that holds the states of a master."""
        return self.inner

    def clear(self) -> None:
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def tensors(self) -> list[Tensor]:
        """Everything it holds beside the parameters: masters and moments."""
        own = [m for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]
        states = [self.inner_of(master).state.get(master, {}) for master in self.masters]
        return own + [t for state in states for t in state.values() if isinstance(t, Tensor)]

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, step counts and masters as flat tensors `<index>.<name>`, for safetensors."""
        found: dict[str, Tensor] = {}
        for index, (parameter, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
            if master is not parameter:
                found[f"{index}.master"] = master.detach()
            for name, value in self.inner_of(master).state.get(master, {}).items():
                found[f"{index}.{name}"] = value
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse. Raises DataError as `check_state` does; nothing is changed then."""
        self.check_state(state)
        self.known = None
        for key, value in state.items():
            number, _, name = key.partition(".")
            index, master = int(number), self.masters[int(number)]
            if name == "master":
                with torch.no_grad():
                    master.copy_(value)
            else:
                place = value.device if name == "step" and master.device.type == "cpu" else master.device
                self._put(index, name, value.to(place, copy=True))

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Look at names, shapes and dtypes alone. Raises DataError: the state is of other parameters, all of them
        listed. A weight that never had a gradient has none."""
        problems, given = list[str](), dict[int, dict[str, Tensor]]()
        for key, tensor in state.items():
            number, _, name = key.partition(".")
            if not _INDEX.fullmatch(number) or int(number) >= len(self.masters):
                problems.append(f"there is a state for parameter {key}, this run has none")
            else:
                given.setdefault(int(number), {})[name] = tensor
        for index, (parameter, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
            found, expected = given.get(index, {}), dict[str, Kind]()
            if master is not parameter:
                expected["master"] = (master.shape, torch.float32)
            if set(found) - {"master"}:
                expected |= self._kinds(index)
            problems += [f"missing: {index}.{name}" for name in expected if name not in found]
            problems += [f"surplus: {index}.{name}" for name in found if name not in expected]
            problems += [
                f"{index}.{name} is {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}"
                for name, tensor in found.items()
                for shape, dtype in [expected.get(name, (tensor.shape, tensor.dtype))]
                if (tensor.shape, tensor.dtype) != (shape, dtype)
            ]
        if problems:
            raise DataError("the optimizer's state is not that of this run", problems)

    def _kinds(self, index: int) -> dict[str, Kind]:
        """What is kept of a weight that was stepped, beside its master."""
        moment = self.masters[index].shape, torch.float32
        return {"step": (torch.Size(), torch.float32), "exp_avg": moment, "exp_avg_sq": moment}

    def _put(self, index: int, name: str, value: Tensor) -> None:
        master = self.masters[index]
        self.inner_of(master).state[master][name] = value


def set_rate(inner: torch.optim.Optimizer, learning_rate: float) -> None:
    """The run's learning rate, times each group's factor."""
    for group in inner.param_groups:
        group["lr"] = learning_rate * group["factor"]


def global_norm(gradients: list[Tensor]) -> Tensor | None:
    """The norm of all gradients together, in float32 whatever they are: a scalar, None where there is no gradient. For
    float32 the same, bit for bit, as `torch.nn.utils.get_total_norm`."""
    if not gradients:
        return None
    norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)
    found: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), 2.0)
    return found


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
