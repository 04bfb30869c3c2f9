"""What recorded blocks (CUDA graphs) keep from step to step, beside what a step makes and frees.

After `spectune.blocks.graphed_block`. A recording reads and writes always the same memory: a copy of each argument that
no block made; each block's outputs, where the next one reads them; gradients of what a block is given and of its
weights. What lies between is a step's, and lives in the graphs' own pool, where nothing else may lie meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from spectune.planning.recorder import Record, Recorder


@dataclass
class Calls:
    """What the blocks that run are given, and what they give, in bytes. Told of each call, in order.

    Attributes:
        copies: of each tensor given that no block made.
        outputs: of each block.
        numbers: of their memory in the record.
        gradients: of what each block is given and that has one.
        last: of the last block's outputs.
    """

    copies: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    numbers: list[int | None] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    last: int = 0
    _seen: set[Any] = field(default_factory=set)

    def note(self, recorder: Recorder, given: Any, made: Any) -> None:
        """A block's arguments and outputs."""
        leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        for leaf in leaves:
            number = recorder.number_of(leaf)
            what = (id(leaf) if number is None else number, leaf.shape, leaf.stride(), leaf.storage_offset())
            if number not in self.numbers and what not in self._seen:
                self._seen.add(what)
                self.copies.append(_bytes([leaf]))
        self.gradients.append(_bytes(leaf for leaf in leaves if leaf.requires_grad))
        results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self.outputs.append(_bytes(results))
        self.numbers.append(recorder.number_of(results[0]))
        self.last = _bytes(leaf for leaf in results if leaf.requires_grad)


@dataclass(frozen=True)
class Static:
    """What the recordings of one shape of a batch keep, in bytes.

    Attributes:
        arguments: copies of them, each.
        outputs: of each block.
        unsaved: those of `outputs` that a step's forward would not keep.
        hidden: gradients of blocks' inputs, each, and of the last one's output.
        weights: gradients of the weights inside of blocks.
    """

    arguments: list[int]
    outputs: list[int]
    unsaved: list[int]
    hidden: list[int]
    weights: list[int]

    @property
    def bytes(self) -> int:
        return sum(map(sum, (self.arguments, self.outputs, self.hidden, self.weights)))

    @property
    def new(self) -> list[int]:
        """Bytes of each tensor that is there beside what a step keeps from forward to backward."""
        return [*self.arguments, *self.unsaved, *self.hidden, *self.weights]

    def terms(self) -> dict[str, int]:
        """`new` by term."""
        return {
            "activations": sum(self.arguments) + sum(self.unsaved),
            "workspace": sum(self.hidden),
            "gradients": sum(self.weights),
        }


def static_of(calls: Calls, record: Record, repeats: Sequence[tuple[int, int]], weights: Sequence[int]) -> Static:
    """What recordings keep, of the calls in the record of a few layers.

    Args:
        repeats: which of the layers that run stand for how many others.
        weights: bytes of each weight that is trained inside of all blocks.
    """
    kept = _alive(record, dict(record.marks)["head"])
    unsaved = [0 if number in kept else size for number, size in zip(calls.numbers, calls.outputs, strict=True)]
    hidden = [*_spread(calls.gradients, repeats), calls.last]
    return Static(calls.copies, _spread(calls.outputs, repeats), _spread(unsaved, repeats), hidden, list(weights))


def apart(record: Record) -> tuple[list[int], list[int]]:
    """Bytes of what a step makes inside of blocks, and of all else, after 0, 1, 2, ... events. Blocks' memory is the
    graphs' and nobody else's, so that the first's peak and the second add up at any time. Gradients of weights are
    copied out of the recordings' memory."""
    marks = dict(record.marks)
    begin, head = marks["F0"], marks["head"]
    backward = min((at for name, at in record.marks if name[0] == "B"), default=len(record.events))
    pool: set[int] = set()
    for at, event in enumerate(record.events):
        if event >= 0 and (begin <= at < head or at >= backward) and record.labels[event] != "gradients":
            pool.add(event)
    inside, outside = (
        list(accumulate((record.signed(e) if (max(e, ~e) in pool) is own else 0 for e in record.events), initial=0))
        for own in (True, False)
    )
    return inside, outside


def _alive(record: Record, until: int) -> set[int]:
    found: set[int] = set()
    for event in record.events[:until]:
        (found.add if event >= 0 else found.discard)(max(event, ~event))
    return found


def _spread(values: Sequence[int], repeats: Sequence[tuple[int, int]]) -> list[int]:
    """One for each layer of the whole model, in no order."""
    return [value for value in [*values, *(values[layer] for layer, n in repeats for _ in range(n))] if value]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
