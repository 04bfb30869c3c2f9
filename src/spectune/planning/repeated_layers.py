"""A step at full depth, made of the few layers that were traced by repeating some of them."""

from collections.abc import Sequence

from spectune.planning.trace import Trace


class UnlikeLayersError(Exception):
    """Neighbouring layers did not make the same tensors, so that one cannot stand for the others."""


def repeat_layers(trace: Trace, repeats: Sequence[tuple[int, int]]) -> Trace:
    """The step with some layers run several times more.

    Args:
        repeats: the number of a traced layer, whose neighbours on both sides are of its kind, and how many copies of it
            stand between it and the layer above.

    What a copy makes, frees of its own and frees of its neighbours' is what the traced layer does; what all layers
    share is freed by the last that frees it.

    Raises:
        UnlikeLayersError: a layer's neighbours made other tensors than it did.
    """
    if not repeats:
        return trace
    ends = [at for _, at in trace.marks[1:]] + [len(trace.events)]
    #: the events after each mark, up to the next one
    parts = {name: trace.events[at:end] for (name, at), end in zip(trace.marks, ends, strict=True)}
    deeper = _Deeper(trace)
    for layer, copies in repeats:
        for kind in ("F", "B"):
            if f"{kind}{layer}" in parts:
                near = (parts[f"{kind}{number}"] for number in (layer - 1, layer, layer + 1))
                deeper.name_copies(layer, copies, *([event for event in part if event >= 0] for part in near))
    copies_of = dict(repeats)
    deeper.play(trace.events[: trace.marks[0][1]], -1)
    for name, _ in trace.marks:
        deeper.trace.marks.append((name, len(deeper.trace.events)))
        # what comes after the last layer sees what that leaves
        layer = len(trace.marks) if name == "head" else int(name[1:])
        order = range(copies_of[layer] + 1) if layer in copies_of else range(-1, 0)
        for copy in order if name[0] == "F" else reversed(order):
            deeper.play(parts[name], layer, copy, last=copy == order[-1 if name[0] == "F" else 0])
    return deeper.trace


class _Deeper:
    """The longer trace while it is made."""

    def __init__(self, trace: Trace) -> None:
        self.trace = Trace(list(trace.sizes), list(trace.labels), between_blocks=set(trace.between_blocks))
        #: (layer, copy) -> traced number -> number: what a tensor is when that layer's events are played as that copy
        self._names: dict[tuple[int, int], dict[int, int]] = {}
        #: layer -> traced number -> number, seen from the layers above, whose neighbour is the last copy
        self._last: dict[int, dict[int, int]] = {}
        self._alive: set[int] = set()

    def name_copies(self, layer: int, copies: int, below: list[int], own: list[int], above: list[int]) -> None:
        sizes, labels = self.trace.sizes, self.trace.labels
        made = [[sizes[number] for number in part] for part in (below, own, above)]
        if made[0] != made[1] or made[1] != made[2]:
            raise UnlikeLayersError
        names = [self._names.setdefault((layer, copy), {}) for copy in range(copies + 1)]
        last = self._last.setdefault(layer, {})
        for lower, number, upper in zip(below, own, above, strict=True):
            chain = [lower, number]
            for _ in range(copies):
                sizes.append(sizes[number])
                labels.append(labels[number])
                if number in self.trace.between_blocks:
                    self.trace.between_blocks.add(len(sizes) - 1)
                chain.append(len(sizes) - 1)
            last[number] = chain[-1]
            chain.append(upper)
            for copy in range(copies + 1):
                names[copy][lower], names[copy][number], names[copy][upper] = chain[copy : copy + 3]

    def play(self, events: list[int], layer: int, copy: int = -1, *, last: bool = True) -> None:
        """Add a layer's events, as a copy sees them where it has copies."""
        mine = self._names.get((layer, copy), {})
        lower = [names for other, names in self._last.items() if other < layer]
        for event in events:
            number = event if event >= 0 else ~event
            seen = mine.get(number)
            if seen is None:
                seen = next((names[number] for names in lower if number in names), number)
            if event >= 0:
                self.trace.events.append(seen)
                self._alive.add(seen)
            elif seen in self._alive and (last or number in mine):
                self.trace.events.append(~seen)
                self._alive.remove(seen)
