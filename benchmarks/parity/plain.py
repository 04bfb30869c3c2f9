"""The reference: a loop that anybody would write, without anything of ours but the delta's modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.parity.task import VALID_ROWS, Task
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectune.data import collate
from spectune.families import embedding_width
from spectune.training.optimizer import learning_rate_at

State = dict[str, Tensor]


@dataclass
class Free:
    """A free run.

    Attributes:
        losses: of each step, nats a token.
        valid: the mean loss of the validation rows at the end.
        states: the trained weights before some of its steps, on the host.
    """

    losses: list[float]
    valid: float
    states: list[State] = field(default_factory=list)


def loss_sum(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross entropy of all logits, summed over target tokens; in float32, or in float64 where the model is."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    rows = logits[:, :-1].flatten(0, 1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return F.cross_entropy(rows, batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")


def free_run(
    task: Task, dtype: torch.dtype, *, clip: float, attention: str | None = None, last_bit: bool = False
) -> Free:
    """Train for the order's steps, after those that are held.

    Args:
        clip: the norm that gradients are clipped to; 0 leaves them.
        last_bit: begin with every trained weight, in float32, moved by one unit of its last place, up or down.
    """
    model = task.load(dtype, attention=attention)
    delta = task.attach(model)
    named = {name: p for name, p in delta.named_parameters() if p.requires_grad}
    masters = {n: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for n, p in named.items()}
    if last_bit:
        _nudge(masters)
    config, rate = task.config(), task.method.learning_rates.at(embedding_width(model)).rate
    optimizer = torch.optim.AdamW(
        masters.values(),
        lr=rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=0.0,
    )
    windows, losses, states = task.steps(), [], []
    every = max(1, task.order.steps // max(1, task.order.held_steps))
    model.train()
    for step in range(task.order.held_steps, task.total):
        if (step - task.order.held_steps) % every == 0 and len(states) < task.order.held_steps:
            states.append({name: master.detach().to("cpu", copy=True) for name, master in masters.items()})
        batch, targets = task.batch(windows[step])
        loss = loss_sum(model, batch) / targets
        loss.backward()
        for name, p in named.items():
            if masters[name] is not p:
                masters[name].grad, p.grad = None if p.grad is None else p.grad.float(), None
        if clip:
            nn.utils.clip_grad_norm_(masters.values(), clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, task.total, rate, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, p in named.items():
                if masters[name] is not p:
                    p.copy_(masters[name])
        losses.append(loss.detach())
    return Free([float(loss) for loss in losses], valid_loss(task, model), states)


@torch.no_grad()
def valid_loss(task: Task, model: Any) -> float:
    model.eval()
    total, targets = 0.0, 0
    for start in range(0, min(VALID_ROWS, len(task.valid.examples)), 20):
        examples = task.valid.examples[start : start + 20]
        batch = {name: tensor.to(task.order.device) for name, tensor in collate(examples, task.pad).items()}
        total += float(loss_sum(model, batch))
        targets += sum(example.target_tokens for example in examples)
    return total / targets


@dataclass(frozen=True)
class At:
    """Loss (nats a token) and gradient (of the mean loss, on the host) of one batch at given weights."""

    loss: float
    gradient: State


def at_states(
    task: Task, dtype: torch.dtype, states: Sequence[State], decoded: Mapping[str, Tensor] | None = None
) -> list[At]:
    """The held steps: step i's rows at the i-th of the states.

    Args:
        decoded: other weights for some linears of the base, `[out, in]` by the linear's path.
    """
    model = task.load(dtype)
    for path, weight in (decoded or {}).items():
        own = model.get_submodule(path).weight
        with torch.no_grad():
            own.copy_(weight.T if isinstance(model.get_submodule(path), Conv1D) else weight)
    delta = task.attach(model)
    model.train()
    found, windows = [], task.steps()
    for step, state in enumerate(states):
        delta.load_training_state_dict(state)
        batch, targets = task.batch(windows[step])
        loss = loss_sum(model, batch) / targets
        loss.backward()
        gradient = {n: p.grad.float().cpu() for n, p in delta.named_parameters() if p.grad is not None}
        found.append(At(float(loss.detach()), gradient))
        for _, p in delta.named_parameters():
            p.grad = None
    return found


def _nudge(named: Mapping[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    for tensor in named.values():
        up = torch.rand(tensor.shape, generator=generator) < 0.5
        there = torch.where(up, torch.inf, -torch.inf).to(tensor)
        moved = torch.nextafter(tensor.detach(), there)
        tensor.detach().copy_(torch.where(tensor == 0, tensor, moved))
