"""Decoder blocks as CUDA graphs: one launch a block and direction, where Python launches every kernel otherwise.

On small models a GPU is done with a kernel before Python has launched the next. A CUDA graph is captured once and
launches all its kernels at once (https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). What is captured here
are the blocks, forward and backward, one graph each: what stands before them (embeddings, masks) and after (the loss,
whose size is another in every batch) makes decisions on the host, which no capture takes.

A pass that is not replayed recomputes its blocks: what backward needs is then one block's, beside the graphs' own
memory, which nothing else may use. So a run takes what its largest shape takes, however many it has.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten
from transformers import PreTrainedModel

from spectune.blocks.call import Call, Wrapper, decoder_blocks, wrapped
from spectune.blocks.compile import can_compile_now
from spectune.blocks.graphed_block import CudaCapture, GraphedBlock, TracedCall, capture_blocks, signature
from spectune.blocks.recompute import recomputed_call
from spectune.deltas import Attachment
from spectune.errors import first_line
from spectune.families import Family

log = logging.getLogger("spectune")

#: passes of a shape before it is captured: the first is traced, and compiles what is compiled
BEFORE_CAPTURE = 1
#: shapes that are captured under one route: each has inputs, outputs and gradients of its own
MOST_SHAPES = 4
#: under all routes: of runs that are trained together some end before the others
MOST_CAPTURES = 4 * MOST_SHAPES


@contextlib.contextmanager
def graphed(
    model: PreTrainedModel, family: Family, parameters: Sequence[nn.Parameter], *,
    capture: Callable[[], CudaCapture] = CudaCapture,
    around_capture: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[None]:  # fmt: skip
    """Inside the `with`, capture the blocks for batches of shapes that come back, and replay them; leave the model as
    it was.

    A pass is forward through all blocks, then backward: a second forward pass before the first one's backward would
    overwrite what that needs. Without gradients (validation) blocks run as they are. A shape that cannot be captured,
    or whose replay gives other results than the blocks, runs as before, and the log says so.

    Args:
        parameters: all that are trained.
        capture: what captures.
        around_capture: entered for each shape's capture: while one is made, all that the graphs hold counts as
            allocated, and never again.
    """
    blocks = _Blocks(model, [p for p in parameters if p.requires_grad], capture(), around_capture)
    running = blocks.capture.running(blocks.release)
    with running, wrapped(decoder_blocks(model, family), Wrapper.CAPTURED, blocks.of):
        yield


class _Blocks:
    """The blocks of a model, and their graphs by the shape of the first one's input."""

    def __init__(
        self, model: PreTrainedModel, parameters: list[nn.Parameter], capture: CudaCapture,
        around_capture: Callable[[], AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        self.model, self.around_capture = model, around_capture
        self.plain: list[Call] = []
        self.recomputed: list[Call] = []
        # one capture for all shapes: what lies between inputs and outputs shares its memory, as no two passes overlap
        self.parameters, self.capture, self.works = parameters, capture, True
        self.captured: dict[Any, list[GraphedBlock] | None] = {}
        self.shape: Any = None
        self.trace: CaptureTrace | None = None
        self.replaying: list[GraphedBlock] | None = None

    def of(self, index: int, layer: nn.Module, inner: Call) -> Call:
        """The call of one more block."""
        self.plain.append(inner)
        self.recomputed.append(recomputed_call(self.model, layer, inner))
        return partial(self.call, index)

    def release(self) -> None:
        """Let go of all graphs, and of the memory that only they hold."""
        self.captured, self.trace, self.replaying = {}, None, None

    def call(self, index: int, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not can_compile_now():
            return self.plain[index](*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        if index == 0:
            self._begin(self._key(leaves))
        if self.replaying is not None and self.replaying[index].takes(leaves, spec):
            return self._replay(index, leaves, args, kwargs)
        output = (self.recomputed if self.works else self.plain)[index](*args, **kwargs)
        if self.trace is not None:
            self.trace.add(index, leaves, spec, output)
        return output

    def _key(self, leaves: list[Any]) -> Any:
        """What has to be the same for captured blocks to serve a pass: the first one's arguments, and the delta of each
        row, which blocks look up while they are captured. None where nothing can be captured."""
        found, attachment = signature(leaves), Attachment.of(self.model)
        if found is None:
            return None
        if attachment is None:
            return found, ()
        layout = attachment.state.layout
        return found, attachment.state.current.names if layout is None else layout.names

    def _begin(self, shape: Any) -> None:
        """Decide what this pass does: run, run and be traced, or replay. Capture what the last pass traced."""
        traced, trace = self.shape, self.trace
        self.shape, self.trace, self.replaying = shape, None, None
        if trace is not None:
            # at once, not when the shape comes back: what is captured after a larger shape finds room in its memory,
            # and a run begins with the largest
            trace.forget_the_pass()
            blocks = self._captured(trace) if len(trace.calls) == len(self.plain) else None
            if self.works:
                self.captured[traced] = blocks
        if shape is None:
            return
        if shape in self.captured:
            self.replaying = self.captured[shape]
            if self.replaying is not None:
                self.replaying[0].inputs.clear()
        elif self.works and self._has_room(shape):
            attachment = Attachment.of(self.model)
            self.trace = CaptureTrace(None if attachment is None else attachment.keeping())

    def _has_room(self, key: Any) -> bool:
        under_its_route = sum(names == key[1] for _, names in self.captured)
        return under_its_route < MOST_SHAPES and len(self.captured) < MOST_CAPTURES

    def _captured(self, trace: CaptureTrace) -> list[GraphedBlock] | None:
        try:
            with self.around_capture(), self._same_randomness():
                # under the route of the pass that was traced, which the one that runs now need not have
                plain = self.plain if trace.keeping is None else [trace.keeping(call) for call in self.plain]
                return capture_blocks(plain, trace.calls, self.parameters, self.capture)
        except RuntimeError as error:
            log.warning("the blocks run without CUDA graphs: %s", first_line(error))
            self._give_up()
            return None

    def _replay(self, index: int, leaves: list[Any], args: Any, kwargs: Any) -> Any:
        assert self.replaying is not None
        block = self.replaying[index]
        if block.passes == 1:
            # whatever a block reads besides its arguments and weights is as it was when it was captured: look once,
            # with the batch after that one, whether it makes a difference
            with self._same_randomness(), torch.no_grad():
                output = self.plain[index](*args, **kwargs)
            with self._same_randomness():
                agrees = block.agrees(leaves, output)
            if not agrees:
                log.warning(
                    "the blocks run without CUDA graphs: block %d gives other results when it is replayed, so it reads "
                    "something that changes from batch to batch", index,
                )  # fmt: skip
                self._give_up()
                return self.plain[index](*args, **kwargs)
        return block(leaves)

    def _give_up(self) -> None:
        """From now on blocks run as they are. What was begun in the graphs' pool cannot be taken back, so that none of
        its graphs is replayed."""
        self.works = False
        self.release()

    def _same_randomness(self) -> AbstractContextManager[None]:
        """Inside, random numbers that come after it once more."""
        device = self.parameters[0].device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


class CaptureTrace:
    """The calls of one pass: values of their tensors, and which tensor of a call is an output of which. `keeping`:
    makes of a call one with what was in force in that pass."""

    def __init__(self, keeping: Callable[[Call], Call] | None = None) -> None:
        self.keeping = keeping
        self.calls: list[TracedCall] = []
        self._copies: dict[int, Tensor] = {}
        self._outputs: dict[int, tuple[int, int]] = {}
        #: keeps what the numbers above stand for
        self._alive: list[Any] = []

    def add(self, index: int, leaves: list[Any], spec: TreeSpec, output: Any) -> None:
        """A block's call; one that is out of order, or holds more than tensors and numbers, ends the trace."""
        found = signature(leaves)
        if index != len(self.calls) or found is None:
            self.calls = []
            return
        chained = {n: self._outputs[id(leaf)] for n, leaf in enumerate(leaves) if id(leaf) in self._outputs}
        kept = [None if n in chained else self._copy(leaf) for n, leaf in enumerate(leaves)]
        self.calls.append(TracedCall(kept, spec, chained, found))
        for number, leaf in enumerate(tree_flatten(output)[0]):
            if isinstance(leaf, Tensor):
                self._outputs[id(leaf)] = (index, number)
        self._alive.append((leaves, output))

    def _copy(self, leaf: Any) -> Any:
        """One copy of a tensor that several blocks are given (a mask, rotary positions)."""
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self._copies:
            self._copies[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
        return self._copies[id(leaf)]

    def forget_the_pass(self) -> None:
        self._outputs, self._alive = {}, []
