"""The rows of one batch at one site: whose modules act on which, and how those of one kind are computed together."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spectune.deltas.modules import Kind, SideModule

log = logging.getLogger("spectune")


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Modules of one kind at one site, and the rows of a batch that they act on.

    Attributes:
        kind: theirs.
        modules: one for each delta.
        own: the rows of each, int64 on the site's device.
        rows: of all together, in the batch's order; None where that is every row of the batch.
        run: so many rows side by side are of one delta, throughout.
        which: for each run of them its module's number, int64; None where that is its own number.
        together: they have a form by row.
    """

    kind: Kind
    modules: tuple[SideModule, ...]
    own: tuple[Tensor, ...]
    rows: Tensor | None
    run: int
    which: Tensor | None
    together: bool

    def by_row(self, sides: Sequence[Tensor]) -> Tensor | None:
        """The last of `sides` with these rows changed. `sides`: as `Kind.by_row` has them, of the whole batch. None:
        one delta after the other, here."""
        if not self.together or (self.kind.dropout and any(module.training for module in self.modules)):
            return None
        operands = stacked([module.operands() or {} for module in self.modules])
        if self.which is not None:
            operands = {name: tensor.index_select(0, self.which) for name, tensor in operands.items()}
        acting = sides if self.rows is None else [side.index_select(0, self.rows) for side in sides]
        rows, tokens = acting[0].shape[:2]
        if self.run > 1:
            acting = [side.reshape(rows // self.run, self.run * tokens, side.shape[-1]) for side in acting]
        made = self.kind.by_row(operands, *acting)
        if self.run > 1:
            made = made.view(rows, tokens, made.shape[-1])
        return made if self.rows is None else sides[-1].index_copy(0, self.rows, made)


def stacked(each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Operands of several modules, `[modules, ...]`, smaller ones filled up with zeros."""
    return {name: _stack([operands[name] for operands in each]) for name in each[0]}


def _stack(tensors: list[Tensor]) -> Tensor:
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) > 1:
        most = [max(sizes) for sizes in zip(*shapes, strict=True)]
        tensors = [tensor if list(tensor.shape) == most else _filled(tensor, most) for tensor in tensors]
    return torch.stack(tensors)


def _filled(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - own for size, own in zip(sizes, tensor.shape, strict=True)]
    return F.pad(tensor, [end for size in reversed(missing) for end in (0, size)])


class Grouping:
    """Batches whose rows have these deltas, at every site. What it makes it makes once, before blocks run: compiled and
    captured ones find tensors only. `names`: the delta of each row."""

    def __init__(self, names: tuple[str | None, ...]) -> None:
        self.names = names
        self.sites: dict[tuple[str, str], tuple[RowGroup, ...]] = {}
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def make(self, site: tuple[str, str], found: Mapping[str, SideModule]) -> tuple[RowGroup, ...]:
        """The groups at a site, given the modules of the batch's deltas there, by name."""
        kinds: dict[Kind, list[str]] = {}
        for name, module in found.items():
            kinds.setdefault(module.alike(), []).append(name)
        made = self.sites[site] = tuple(self._group(kind, names, found) for kind, names in kinds.items())
        return made

    def _group(self, kind: Kind, names: list[str], found: Mapping[str, SideModule]) -> RowGroup:
        modules = tuple(found[name] for name in names)
        device = next(modules[0].parameters()).device
        acting = [row for row, name in enumerate(self.names) if name in names]
        order = [names.index(self.names[row]) for row in acting]  # type: ignore[arg-type]
        # runs side by side of one delta, in one piece for as many rows as divide all of them
        run = math.gcd(*(len(list(same)) for _, same in itertools.groupby(order)))
        which = order[::run]
        own = [[row for row in acting if self.names[row] == name] for name in names]
        together = modules[0].operands() is not None
        _say(kind, together)
        return RowGroup(
            kind, modules, tuple(self._index(rows, device) for rows in own),
            None if len(acting) == len(self.names) else self._index(acting, device), run,
            None if which == list(range(len(names))) else self._index(which, device), together,
        )  # fmt: skip

    def _index(self, rows: Sequence[int], device: torch.device) -> Tensor:
        key = tuple(rows), device
        if key not in self._indices:
            self._indices[key] = torch.tensor(rows, device=device)
        return self._indices[key]


@functools.cache
def _say(kind: Kind, together: bool) -> None:
    """What is computed one delta after the other, once."""
    if not together:
        log.info("mixed batches: %s has no form by row, so its deltas run one after the other", kind.of.__name__)
    elif kind.dropout:
        log.info(
            "mixed batches: %s with dropout draws for each delta, so in training its deltas run one after the other",
            kind.of.__name__,
        )  # fmt: skip
