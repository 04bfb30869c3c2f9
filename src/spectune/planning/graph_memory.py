"""What blocks that are captured as CUDA graphs keep from step to step, beside what a step makes and frees.

After `spectune.blocks.graphed_block`. A graph reads and writes always the same memory: a copy of each argument that no
block made; each block's outputs, where the next one reads them; gradients of what a block is given and of its weights.
What lies between is a step's, and lives in the graphs' own pool, where nothing else may lie meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from spectune.compute.memory import has_expandable_segments
from spectune.planning.allocator import Block, CachingAllocator
from spectune.planning.trace import GraphBuffers, Trace
from spectune.planning.tracer import Tracer


@dataclass
class BlockTensors:
    """Arguments and outputs of the blocks that run, in bytes, noted at each call in order.

    Attributes:
        copies: of each argument that no block made.
        outputs: of each block.
        numbers: of the outputs' memory in the trace.
        gradients: of each block's arguments that have a gradient.
        last: of the last block's outputs that have one.
    """

    copies: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    numbers: list[int | None] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    last: int = 0
    _seen: set[Any] = field(default_factory=set)

    def note(self, tracer: Tracer, arguments: Any, output: Any) -> None:
        """Add a block's call."""
        leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        for leaf in leaves:
            number = tracer.number_of(leaf)
            view = (id(leaf) if number is None else number, leaf.shape, leaf.stride(), leaf.storage_offset())
            if number not in self.numbers and view not in self._seen:
                self._seen.add(view)
                self.copies.append(_bytes([leaf]))
        self.gradients.append(_bytes(leaf for leaf in leaves if leaf.requires_grad))
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.outputs.append(_bytes(made))
        self.numbers.append(tracer.number_of(made[0]))
        self.last = _bytes(leaf for leaf in made if leaf.requires_grad)


def graph_buffers(
    tensors: BlockTensors, trace: Trace, repeats: Sequence[tuple[int, int]], weights: Sequence[int]
) -> GraphBuffers:
    """The static buffers of all layers' graphs, from the trace of a few. `repeats`: which of the layers that run stand
    for how many others; `weights`: bytes of each weight that is trained inside of all blocks."""

    def at_full_depth(values: Sequence[int]) -> list[int]:
        """One for each layer, in no order."""
        return [value for value in [*values, *(values[layer] for layer, n in repeats for _ in range(n))] if value]

    kept, sizes = trace.alive(trace.head), zip(tensors.numbers, tensors.outputs, strict=True)
    unsaved = at_full_depth([0 if number in kept else size for number, size in sizes])
    hidden = [*at_full_depth(tensors.gradients), tensors.last]
    block = _block(trace, split_by_graph_pool(trace)[0])
    return GraphBuffers(tensors.copies, at_full_depth(tensors.outputs), unsaved, hidden, list(weights), block)


@dataclass(frozen=True)
class GraphMemory:
    """What the graphs of a run hold, in bytes, for batches of a few shapes, the largest of which was traced.

    Attributes:
        arguments: copies of the blocks' arguments, of all shapes.
        pool: all else of all shapes, and what a replay makes and frees. Shapes are captured one after the other into
            one pool: what an earlier one keeps from pass to pass is not free for a later one's step.
        uncaptured: of a pass of the second largest shape before its capture, which recomputes its blocks, beside the
            pool: their inputs, and one block's step or the loss. 0 where there is no other shape: what is captured
            first has its pass before there is a pool.
    """

    arguments: int
    pool: int
    uncaptured: int

    @classmethod
    def of(cls, trace: Trace, shares: Sequence[float]) -> GraphMemory:
        """Of a trace with `buffers`, and of smaller shapes with these shares of its tokens, the largest first."""
        buffers = trace.buffers
        assert buffers is not None
        outside = max(split_by_graph_pool(trace)[1])
        uncaptured = shares[0] * (sum(buffers.outputs) + max(buffers.block, outside)) if shares else 0
        return cls(int(sum(buffers.arguments) * (1 + sum(shares))), _captured(trace, shares), int(uncaptured))


def _captured(trace: Trace, shares: Sequence[float]) -> int:
    """Bytes of the pool once all shapes are captured, by the allocator's rules: what blocks hand to each other and the
    gradients of weights stay, all else is given back."""
    allocator, inside = CachingAllocator(expandable=has_expandable_segments()), _in_pool(trace)
    assert trace.buffers is not None
    for share in (1.0, *shares):
        blocks: dict[int, Block] = {}
        for event in trace.events:
            number = max(event, ~event)
            if number not in inside:
                continue
            if event >= 0:
                blocks[number] = allocator.take(int(share * trace.sizes[number]))
            elif number not in trace.between_blocks:
                allocator.give(blocks.pop(number))
        for number, block in blocks.items():
            if number not in trace.between_blocks:
                allocator.give(block)
        for size in trace.buffers.weights:
            allocator.take(size)
    return allocator.reserved


def _block(trace: Trace, inside: Sequence[int]) -> int:
    """Bytes of a block's forward and backward by itself, where that is most: by how much memory falls from its peak in
    the block's backward to the end of that."""
    begins = [at for name, at in trace.marks if name[0] == "B"]
    ends = [*begins[1:], len(trace.events)]
    return max((max(inside[a : b + 1]) - inside[b] for a, b in zip(begins, ends, strict=True)), default=0)


def split_by_graph_pool(trace: Trace) -> tuple[list[int], list[int]]:
    """Live bytes inside and outside of the graphs' pool, after 0, 1, 2, ... events.

    Nothing else may use the pool's memory, so that the peaks of both add up at any time. Gradients of weights are
    copied out of it.
    """
    pool = _in_pool(trace)
    inside, outside = (
        list(accumulate((trace.signed(e) if (max(e, ~e) in pool) is own else 0 for e in trace.events), initial=0))
        for own in (True, False)
    )
    return inside, outside


def _in_pool(trace: Trace) -> set[int]:
    """Numbers of the tensors that blocks make, but for the gradients of weights, which are copied out."""
    begin, head, backward = dict(trace.marks)["F0"], trace.head, trace.begin_of_backward
    return {
        event
        for at, event in enumerate(trace.events)
        if event >= 0 and (begin <= at < head or at >= backward) and trace.labels[event] != "gradients"
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
