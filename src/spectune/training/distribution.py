"""Several processes, one model: rows are shared out, gradients are summed. Started by torchrun; alone otherwise."""

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class World:
    """This process's place among all. Without torchrun, the only one."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a batch."""
        return items[self.rank :: self.size]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes of a number, in float64 where there are several."""
        if self.size > 1:
            value = value.to(torch.float64, copy=True)
            dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up gradients in place; a parameter without one counts as zero."""
        for parameter in parameters if self.size > 1 else ():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
