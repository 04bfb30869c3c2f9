"""The optimizer steps of runs that are trained together, in few launches: each run's own, to the last bit.

A run's step is some twenty small operations over its weights (a norm, clipping, counts, AdamW), most of whose time is
the host's. Of runs that step at the same time those that are alike are one operation over the weights of all, and what
a run has of its own, its rate, its clipping, whether its step is taken, is an argument of its own kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectune.training.optimizer import MasterAdamW


@dataclass(frozen=True)
class AskedStep:
    """A step that one run's optimizer is to take: its gradients are there.

    Attributes:
        rate: the run's learning rate in this step.
        max_grad_norm: gradients are clipped to it; 0 leaves them.
        loss: a scalar on the device; where it is not finite, the step is not taken. None asks for the norm alone.
    """

    optimizer: MasterAdamW
    rate: float
    max_grad_norm: float
    loss: Tensor | None = None

    def take(self) -> Tensor:
        """The step by itself. Returns the norm of the gradients before clipping."""
        return self.optimizer.step(self.rate, self.max_grad_norm, self.loss)


@dataclass
class _Group:
    """Weights with one rate, of one run, and what AdamW keeps of each."""

    betas: tuple[float, float]
    weight_decay: float
    eps: float
    factor: float
    numbers: list[int] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    firsts: list[Tensor] = field(default_factory=list)
    seconds: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)

    def add(self, number: int, master: Tensor, state: dict[str, Tensor]) -> None:
        self.numbers.append(number)
        self.weights.append(master)
        self.counts.append(state["step"])
        self.firsts.append(state["exp_avg"])
        self.seconds.append(state["exp_avg_sq"])


@dataclass
class _Part:
    """A run's step on the way: the gradients that its optimizer took, and the weights that have one."""

    asked: AskedStep
    gradients: list[Tensor | None]
    stepped: list[Tensor] = field(default_factory=list)
    norm: Tensor | None = None
    skipped: Tensor | None = None

    def __post_init__(self) -> None:
        self.stepped = [gradient for gradient in self.gradients if gradient is not None]


@torch.no_grad()
def step_together(asked: Sequence[AskedStep]) -> list[Tensor]:
    """Take the steps of several runs, each as its own optimizer would: clipped by its own norm, and not taken where
    its loss or its gradient is not finite, whatever the others do; gradients are cleared. Nothing here waits for the
    device.

    Returns:
        the norm of each run's gradients before clipping, float32 scalars on the device of the gradients.
    """
    alone = {n: one.take() for n, one in enumerate(asked) if not _shares(one.optimizer)}
    parts = {n: _Part(one, one.optimizer.take_gradients()) for n, one in enumerate(asked) if n not in alone}
    together = [part for part in parts.values() if part.stepped]
    if together:
        _norms(together)
        for part in together:
            _clip(part)
        _adamw(together)
    norms = {n: torch.zeros(()) if part.norm is None else part.norm for n, part in parts.items()} | alone
    return [norms[n] for n in range(len(asked))]


def _adamw(parts: Sequence[_Part]) -> None:
    """AdamW of all, whose counts of steps are one operation."""
    chosen = [(part, *found) for part in parts for found in _chosen(part)]
    counts = [count for _, group, _ in chosen for count in group.counts]
    torch._foreach_add_(counts, 1)
    for part, group, gradients in chosen:
        torch._fused_adamw_(
            group.weights, gradients, group.firsts, group.seconds, [], group.counts,
            lr=part.asked.rate * group.factor, beta1=group.betas[0], beta2=group.betas[1],
            weight_decay=group.weight_decay, eps=group.eps, amsgrad=False, maximize=False, found_inf=part.skipped,
        )  # fmt: skip
    # a step that was not taken does not count
    skipped: Any = [part.skipped for part, group, _ in chosen for _ in group.counts]
    torch._foreach_sub_(counts, skipped)


def _chosen(part: _Part) -> Iterator[tuple[_Group, list[Tensor]]]:
    """The groups of a run with a gradient for each of their weights."""
    optimizer, only = part.asked.optimizer, None
    if len(part.stepped) < len(part.gradients):  # experts, say, that no token went to
        only = {n for n, found in enumerate(part.gradients) if found is not None}
    elif optimizer.known is None:
        optimizer.known = _groups(optimizer)
    groups: list[_Group] = optimizer.known if only is None else _groups(optimizer, only)
    for group in groups:
        yield group, [found for n in group.numbers if (found := part.gradients[n]) is not None]


def _shares(optimizer: MasterAdamW) -> bool:
    """Whether its step is plain AdamW over float32 weights of one device, behind backward."""
    if type(optimizer) is not MasterAdamW or len({p.device for p in optimizer.parameters}) > 1:
        return False
    return all(m is p for m, p in zip(optimizer.masters, optimizer.parameters, strict=True))


def _norms(parts: Sequence[_Part]) -> None:
    """The norm of each run's gradients, and whether its step is left out: that of each weight in one operation."""
    of_all = torch._foreach_norm([gradient for part in parts for gradient in part.stepped], 2.0, dtype=torch.float32)
    at = 0
    for part in parts:
        part.norm = torch.linalg.vector_norm(torch.stack(of_all[at : at + len(part.stepped)]), 2.0)
        at += len(part.stepped)
    norms = torch.stack([part.norm for part in parts if part.norm is not None])
    finite = norms.isfinite()
    if any(part.asked.loss is not None for part in parts):
        losses = [norms[n] if part.asked.loss is None else part.asked.loss for n, part in enumerate(parts)]
        finite &= torch.stack([loss.to(norms.device, torch.float32) for loss in losses]).isfinite()
    for part, skipped in zip(parts, (~finite).float().unbind(), strict=True):
        part.skipped = skipped


def _clip(part: _Part) -> None:
    """As `torch.nn.utils.clip_grads_with_norm_` does."""
    most = part.asked.max_grad_norm or math.inf
    if math.isinf(most) or part.norm is None:
        return
    torch._foreach_mul_(part.stepped, torch.clamp(most / (part.norm + 1e-6), max=1.0))


def _groups(optimizer: MasterAdamW, only: Set[int] | None = None) -> list[_Group]:
    """The optimizer's groups, of the weights of these numbers, one where nothing differs between them; what is kept of
    each weight is made where it is not there."""
    numbers, found = {id(master): n for n, master in enumerate(optimizer.masters)}, dict[tuple[Any, ...], _Group]()
    for group in optimizer.inner.param_groups:
        settings = group["betas"], group["weight_decay"], group["eps"], group["factor"]
        own = found.setdefault(settings, _Group(*settings))
        for master in group["params"]:
            if only is None or numbers[id(master)] in only:
                own.add(numbers[id(master)], master, _state(optimizer.inner, master))
    return [group for group in found.values() if group.weights]


def _state(inner: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """What torch's fused AdamW keeps of a weight, as it makes it."""
    state: dict[str, Tensor] = inner.state[master]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(master, memory_format=torch.preserve_format)
    return state
