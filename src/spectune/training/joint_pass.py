"""A pass over rows of several runs, forward and backward: each run's gradient is that of its own rows."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectune.blocks.compile import can_compile_now
from spectune.blocks.execution import Execution
from spectune.compute.masks import OneTextRows
from spectune.deltas import Attachment, Route, route
from spectune.errors import OutOfMemoryError, is_out_of_memory
from spectune.objectives import objective_of
from spectune.training.joint_batches import JointBatch

#: routes that are kept: rows of unlike lengths meet in ever new company, for as long as runs take
_MOST_ROUTES = 64


class JointPasses:
    """Runs batches of several runs' rows through one model."""

    def __init__(self, model: PreTrainedModel, execution: Execution) -> None:
        self.model, self.execution = model, execution
        #: by the names of rows, the latest last: what is found out of a route is found once
        self._routes: dict[tuple[str, ...], Route] = {}
        self._one_text_rows = OneTextRows()

    def backward(self, batch: JointBatch) -> list[Tensor]:
        """Add to each run's gradient that of its rows in a batch. Returns the loss sum of each, detached. Raises
        OutOfMemoryError."""
        try:
            with self._routed(batch.names), self._one_text_rows.passes():
                device, fuse = self.model.device, self.execution.compiled and can_compile_now()
                placed = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.tensors.items()}
                weights = batch.weights.to(device, non_blocking=True)
                with self.execution.attention(placed):
                    losses = objective_of(self.model).token_losses(self.model, placed, fuse=fuse).losses
                    # a run whose loss is no number has such gradients alone: no row knows of another
                    torch.autograd.backward((losses * weights).sum())
                return [part.sum() for part in torch.split(losses.detach(), batch.counts)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            rows, length = batch.tensors["input_ids"].shape
            raise OutOfMemoryError(
                f"out of memory in a step of {len(batch.runs)} runs together, with a batch of {rows} rows of {length} "
                f"tokens. Train at most {max(1, len(batch.runs) // 2)} of them together, or try a smaller "
                "per_device_train_batch_size, a smaller max_length, or gradient_checkpointing=true."
            ) from error

    @contextlib.contextmanager
    def _routed(self, names: tuple[str, ...]) -> Iterator[None]:
        attachment = Attachment.of(self.model)
        assert attachment is not None
        found = self._routes.pop(names, None)
        if found is None:
            with route(self.model, names):  # whatever speaks against it is said here
                found = attachment.state.current
            # captured blocks read what a route holds for as long as they are replayed
            if len(self._routes) >= _MOST_ROUTES and not self.execution.graphs:
                del self._routes[next(iter(self._routes))]
        self._routes[names] = found
        with attachment.state.routed(found):
            yield
