"""A step at full depth, made of the recorded few layers by repeating one of them."""

from __future__ import annotations

from spectune.planning.recorder import Record

#: the layer that is repeated, of the few that were recorded; it and both its neighbours must do the same
REPEATED = 2


class NotAlikeError(Exception):
    """Neighbouring layers did not make the same tensors, so that one cannot stand for the others."""


def deepened(record: Record, copies: int) -> Record:
    """The step with layer `REPEATED` run `copies` more times, between itself and the layer above it.

    What a copy makes, frees of its own and frees of its neighbours' is what the recorded layer does; what all layers
    share is freed by the last that frees it.

    Raises:
        NotAlikeError: the layer's neighbours made other tensors than it did.
    """
    if copies <= 0:
        return record
    parts = _parts(record)
    born = {name: [event for event in part if event >= 0] for name, part in parts.items()}
    deeper = _Deeper(record)
    r = REPEATED
    for kind in ("F", "B"):
        if f"{kind}{r}" in parts:
            deeper.name_copies(born[f"{kind}{r - 1}"], born[f"{kind}{r}"], born[f"{kind}{r + 1}"], copies)
    deeper.play(record.events[: record.marks[0][1]], None)
    for name, _ in record.marks:
        deeper.record.marks.append((name, len(deeper.record.events)))
        if name in (f"F{r}", f"B{r}"):
            order = range(copies + 1) if name[0] == "F" else range(copies, -1, -1)
            for copy in order:
                deeper.play(parts[name], copy, last=copy == order[-1])
        else:
            above = name in (f"F{r + 1}", f"B{r + 1}", "head")
            deeper.play(parts[name], copies + 1 if above else None)
    return deeper.record


def _parts(record: Record) -> dict[str, list[int]]:
    """The events after each mark, up to the next one."""
    ends = [at for _, at in record.marks[1:]] + [len(record.events)]
    return {name: record.events[at:end] for (name, at), end in zip(record.marks, ends, strict=True)}


class _Deeper:
    """The longer record while it is made. `names[copy, number]`: which tensor a recorded number stands for when the
    repeated layer's events are played as its `copy`-th copy; 0 is the layer itself."""

    def __init__(self, record: Record) -> None:
        self.record = Record(list(record.sizes), list(record.labels))
        self.names: dict[tuple[int, int], int] = {}
        self._alive: set[int] = set()

    def name_copies(self, below: list[int], own: list[int], above: list[int], copies: int) -> None:
        sizes, labels, names = self.record.sizes, self.record.labels, self.names
        made = [[sizes[number] for number in part] for part in (below, own, above)]
        if made[0] != made[1] or made[1] != made[2]:
            raise NotAlikeError
        for lower, number, upper in zip(below, own, above, strict=True):
            chain = [lower, number]
            for _ in range(copies):
                sizes.append(sizes[number])
                labels.append(labels[number])
                chain.append(len(sizes) - 1)
            chain.append(upper)
            for copy in range(copies + 1):
                names[copy, lower], names[copy, number], names[copy, upper] = chain[copy : copy + 3]
            names[copies + 1, number] = chain[-2]  # seen from the layer above, its neighbour is the last copy

    def play(self, events: list[int], copy: int | None, *, last: bool = True) -> None:
        """Add events as a copy sees them."""
        for event in events:
            number = event if event >= 0 else ~event
            seen = number if copy is None else self.names.get((copy, number), number)
            if event >= 0:
                self.record.events.append(seen)
                self._alive.add(seen)
            elif seen in self._alive and (last or copy is None or (copy, number) in self.names):
                self.record.events.append(~seen)
                self._alive.remove(seen)
