"""What a traced step does to memory: tensors made and freed, in order, and its moments by term."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

#: what the bytes of a step are for
TERMS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")


@dataclass(frozen=True)
class GraphBuffers:
    """Static buffers of the CUDA graphs of one shape of a batch, in bytes.

    Attributes:
        arguments: copies of blocks' arguments that no block made, each.
        outputs: of each block.
        unsaved: those of `outputs` that a step's forward would not keep for backward.
        hidden: gradients of blocks' inputs, each, and of the last one's output.
        weights: gradients of the weights inside of blocks.
        block: what a block's forward and backward take by themselves.
    """

    arguments: list[int]
    outputs: list[int]
    unsaved: list[int]
    hidden: list[int]
    weights: list[int]
    block: int = 0

    @property
    def bytes(self) -> int:
        return sum(map(sum, (self.arguments, self.outputs, self.hidden, self.weights)))

    @property
    def extra(self) -> list[int]:
        """Bytes of each buffer that is not counted among the activations that a step keeps for backward."""
        return [*self.arguments, *self.unsaved, *self.hidden, *self.weights]

    def terms(self) -> dict[str, int]:
        """`extra` by term."""
        return {
            "activations": sum(self.arguments) + sum(self.unsaved),
            "workspace": sum(self.hidden),
            "gradients": sum(self.weights),
        }


@dataclass
class Trace:
    """Tensors in the order of their making, and events.

    Attributes:
        sizes, labels: bytes of each tensor, and what it is for.
        events: `number` for a tensor made and `~number` for one freed.
        marks: names of places among the events: `F<layer>` before a layer, `head` after the last one, `B<layer>` where
            backward comes to a layer.
        buffers: static buffers of the blocks' CUDA graphs, where there are any.
        between_blocks: numbers of the tensors that one block hands to another: outputs, and gradients of inputs. Graphs
            keep them.
    """

    sizes: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[tuple[str, int]] = field(default_factory=list)
    buffers: GraphBuffers | None = None
    between_blocks: set[int] = field(default_factory=set)

    def signed(self, event: int) -> int:
        """Bytes made (above 0) or freed."""
        return self.sizes[event] if event >= 0 else -self.sizes[~event]

    def live(self) -> list[int]:
        """Bytes after 0, 1, 2, ... events."""
        return list(accumulate(map(self.signed, self.events), initial=0))

    def alive(self, until: int) -> set[int]:
        """Numbers of the tensors that are there after so many events."""
        numbers: set[int] = set()
        for event in self.events[:until]:
            (numbers.add if event >= 0 else numbers.discard)(max(event, ~event))
        return numbers

    def by_label(self, until: int | None = None) -> dict[str, int]:
        """Bytes by label after so many events, or at the end."""
        bytes_of: dict[str, int] = defaultdict(int)
        for event in self.events[:until]:
            bytes_of[self.labels[max(event, ~event)]] += self.signed(event)
        return bytes_of

    @property
    def head(self) -> int:
        """The first event after the last layer's forward."""
        return dict(self.marks).get("head", len(self.events))

    @property
    def begin_of_backward(self) -> int:
        """The first event of the layers' backward; the end where there is none."""
        return min((at for name, at in self.marks if name[0] == "B"), default=len(self.events))


@dataclass(frozen=True)
class Moment:
    """One part of a step where it is largest: bytes by term, all at once."""

    name: str
    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())
