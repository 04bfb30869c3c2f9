"""How a run is executed, as one value: decided once, read by training, planning and comparing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from spectune.blocks.compile import compiled, memory_budget
from spectune.blocks.cuda_graphs import graphed
from spectune.blocks.graphed_block import CudaCapture
from spectune.blocks.offload import Transfers
from spectune.blocks.recompute import Recomputation, recomputing
from spectune.compute.cudnn import cudnn_attention
from spectune.compute.memory import counts_tensors
from spectune.compute.pack_layout import Kernel
from spectune.deltas import Delta


@dataclass(frozen=True)
class Packing:
    """How the rows of a step become batches.

    Attributes:
        on: rows share sequences.
        kernel: attention for packs; None uses masks.
        virtual: virtual tokens that stand in the sequence before each row.
        longest: tokens of the longest row, of those that one compiled graph is to serve.
        mask_free: padding needs no mask: it stands on the right, and the model is causal throughout.
        lengths: tokens that padded batches are filled up to, so that they come in few shapes; for a plan in the order
            in which these come. Without any, each batch is as long as its longest row.
        rows: rows that these are filled up to.
    """

    on: bool = False
    kernel: Kernel | None = None
    virtual: int = 0
    longest: int = 0
    mask_free: bool = False
    lengths: tuple[int, ...] = ()
    rows: int = 0

    def filled(self, rows: int, length: int) -> tuple[int, int]:
        """Rows and tokens of a padded batch of `rows` whose longest has `length` tokens."""
        longer = [size for size in self.lengths if size >= length]
        return (max(rows, self.rows), min(longer)) if longer else (rows, length)


@dataclass(frozen=True)
class Execution:
    """How the steps of a run are executed. The numbers of a run do not depend on it, but for rounding.

    Attributes:
        compiled: decoder blocks run through torch.compile.
        graphs: decoder blocks are captured as CUDA graphs and replayed; not where anything is recomputed.
        recomputation: what backward computes again instead of keeping it.
        cudnn: attention may take cuDNN's kernels in steps without a mask, where the device has them.
        packing: how rows become batches.
        reasons: why, a sentence by the setting's name, where there is something to say.
    """

    compiled: bool = False
    graphs: bool = False
    recomputation: Recomputation = False
    cudnn: bool = True
    packing: Packing = field(default_factory=Packing)
    reasons: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def settings(self) -> dict[str, bool | str]:
        """What settings of `TrainingConfig` came to."""
        return {"gradient_checkpointing": self.recomputation, "torch_compile": self.compiled,
                "cuda_graphs": self.graphs}  # fmt: skip

    def reason(self, setting: str) -> str | None:
        """Why a setting of `TrainingConfig` came to what it is; None where there is nothing to say."""
        return dict(self.reasons).get(setting)

    def because(self, setting: str, reason: str | None) -> Execution:
        """With one more reason, if there is one."""
        return self if reason is None else replace(self, reasons=(*self.reasons, (setting, reason)))

    def recomputing(self, mode: Recomputation) -> Execution:
        """The same with another recomputation; graphs keep their activations, so they go with none alone."""
        if not self.graphs or mode is False:
            return replace(self, recomputation=mode)
        reasons = tuple(reason for reason in self.reasons if reason[0] != "cuda_graphs")
        packing = replace(self.packing, lengths=(), rows=0)
        return replace(self, recomputation=mode, graphs=False, packing=packing, reasons=reasons)

    def of_first_steps(self, device_type: str) -> Execution:
        """The same as a run's first steps are executed, which hold its longest batch: not compiled where tensors are
        counted in them (`spectune.blocks.compile.can_compile_now`)."""
        return replace(self, compiled=self.compiled and not counts_tensors(device_type))

    def attention(self, batch: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Around a batch's step, forward and backward (which may run blocks again): the attention it may take. Packs
        have masks, or a kernel of their own."""
        return cudnn_attention(self.cudnn and not self.packing.on and "attention_mask" not in batch)

    @contextlib.contextmanager
    def applied(
        self, *deltas: Delta, backend: str | Callable[..., Any] = "inductor",
        capture: Callable[[], CudaCapture] = CudaCapture, transfers: Transfers | None = None,
        around_capture: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Iterator[None]:  # fmt: skip
        """Inside the `with`, the model of attached deltas trains them like this; after it, it is as it was.

        Args:
            backend: of `torch.compile`.
            capture, transfers: what captures graphs, and what copies block inputs to host memory and back.
            around_capture: as `graphed` has it.

        Raises:
            ConfigError: block inputs are to go to host memory, and the model is not on a CUDA device.
        """
        model, family = deltas[0].model, deltas[0].family
        with contextlib.ExitStack() as stack:
            stack.enter_context(cudnn_attention(self.cudnn))
            if self.compiled:
                budget = memory_budget(self.recomputation)
                stack.enter_context(compiled(model, family, backend=backend, memory_budget=budget))
            stack.enter_context(recomputing(model, self.recomputation, transfers=transfers))
            if self.graphs:
                trained = [parameter for delta in deltas for parameter in delta.parameters()]
                graphs = graphed(model, family, trained, capture=capture, around_capture=around_capture)
                stack.enter_context(graphs)
            yield
