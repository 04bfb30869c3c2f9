"""The rows of one batch at one site: whose modules act on which, and how those of one kind are computed together."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.deltas.modules import Kind, SideModule

log = logging.getLogger("spectune")


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Modules of one kind at one site, and the rows of a batch that they act on.

    Attributes:
        kind: theirs.
        modules: one for each delta.
        own: the rows of each, int64 on the site's device.
        run: so many rows side by side are of one delta, throughout.
        which: for each run of them its module's number, int64; None where that is its own number.
        together: they have a form by row.
    """

    kind: Kind
    modules: tuple[SideModule, ...]
    own: tuple[Tensor, ...]
    run: int
    which: Tensor | None
    together: bool

    def one_by_one(self) -> bool:
        """Whether each delta's rows are computed by themselves now."""
        return not self.together or bool(self.kind.dropout and any(module.training for module in self.modules))

    def by_row(self, sides: Sequence[Tensor]) -> Tensor:
        """The last of `sides`, changed. `sides`: as `Kind.by_row` has them, of this group's rows."""
        operands = self.kind.of.stacked(self.modules)
        if self.which is not None:
            operands = {name: tensor.index_select(0, self.which) for name, tensor in operands.items()}
        if self.run == 1:
            return self.kind.by_row(operands, *sides)
        rows, tokens, features = sides[-1].shape
        folded = [side.reshape(rows // self.run, self.run * tokens, side.shape[-1]) for side in sides]
        return self.kind.by_row(operands, *folded).view(rows, tokens, features)


@dataclass(frozen=True, eq=False)
class SiteRows:
    """The rows of a batch at one site, side by side by group.

    Attributes:
        parts: the groups, in this order; None are rows that nothing acts on.
        sizes: rows of each part.
        order: for each row in this order its number in the batch, int64; None where it is the batch's own order.
        back: the inverse.
    """

    parts: tuple[RowGroup | None, ...]
    sizes: tuple[int, ...]
    order: Tensor | None
    back: Tensor | None

    def changed(self, sides: Sequence[Tensor], picked: Callable[[SideModule, Tensor], Tensor]) -> Tensor:
        """The last of `sides` with each row changed by its own delta. `sides`: as `Kind.by_row` has them, of the whole
        batch. `picked`: what a module makes of its own rows by themselves."""
        if self.order is not None:
            sides = [side.index_select(0, self.order) for side in sides]
        # a cut and a joint are one copy, forward and backward, however many parts there are
        cut = [torch.split(side, list(self.sizes)) if len(self.sizes) > 1 else (side,) for side in sides]
        parts = list(zip(*cut, strict=True))
        made: list[Tensor] = []
        for group, part in zip(self.parts, parts, strict=True):
            if group is None:
                made.append(part[-1])
            elif group.one_by_one():
                made += [picked(*pair) for pair in zip(group.modules, group.own, strict=True)]
            else:
                made.append(group.by_row(part))
        joined = torch.cat(made) if len(made) > 1 else made[0]
        return joined if self.back is None else joined.index_select(0, self.back)


class Grouping:
    """Batches whose rows have these deltas, at every site. What it makes it makes once, before blocks run: compiled and
    captured ones find tensors only. `names`: the delta of each row."""

    def __init__(self, names: tuple[str | None, ...]) -> None:
        self.names = names
        self.sites: dict[tuple[str, str], SiteRows | None] = {}
        self._numbers: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def make(self, site: tuple[str, str], found: Mapping[str, SideModule]) -> SiteRows | None:
        """The groups at a site, given the modules of the batch's deltas there, by name; None where there are none."""
        kinds: dict[Kind, list[str]] = {}
        for name, module in found.items():
            kinds.setdefault(module.alike(), []).append(name)
        made = self.sites[site] = self._rows(kinds, found) if kinds else None
        return made

    def _rows(self, kinds: Mapping[Kind, list[str]], found: Mapping[str, SideModule]) -> SiteRows:
        with torch.no_grad():
            formed = {kind: found[names[0]].operands() for kind, names in kinds.items()}
        device = next((place.device for form in formed.values() if form for place in form.values()), None)
        if device is None:
            device = next(next(iter(found.values())).parameters()).device
        together = {kind for kind, form in formed.items() if form is not None}
        of_name = {name: kind for kind, names in kinds.items() for name in names}
        # stretches of the batch as it is, where each kind is one of them
        stretches = [
            (kind, [row for row, _ in rows])
            for kind, rows in itertools.groupby(enumerate(self.names), lambda each: of_name.get(each[1] or ""))
        ]
        acting = [kind for kind, _ in stretches if kind is not None]
        in_order = len(acting) == len(set(acting)) and all(
            self._sorted(rows) for kind, rows in stretches if kind and (kind.dropout or kind not in together)
        )
        if not in_order:
            rows_of = {kind: [row for row, name in enumerate(self.names) if of_name.get(name or "") == kind]
                       for kind in (None, *kinds)}  # fmt: skip
            stretches = [
                (kind, sorted(rows, key=lambda row: self.names.index(self.names[row])))
                for kind, rows in rows_of.items()
                if rows
            ]
        order = [row for _, rows in stretches for row in rows]
        back = sorted(range(len(order)), key=order.__getitem__)
        return SiteRows(
            tuple(
                None if kind is None else self._group(kind, rows, found, device, kind in together)
                for kind, rows in stretches
            ),
            tuple(len(rows) for _, rows in stretches),
            None if in_order else self.numbers(order, device),
            None if in_order else self.numbers(back, device),
        )

    def _group(
        self, kind: Kind, rows: Sequence[int], found: Mapping[str, SideModule], device: torch.device, together: bool
    ) -> RowGroup:
        # in the order in which they come: where each has one run there is nothing to choose
        names = [name for name in dict.fromkeys(self.names[row] for row in rows) if name is not None]
        numbers = [names.index(self.names[row]) for row in rows]  # type: ignore[arg-type]
        # one set of operands for as many rows side by side as divide all runs of one delta
        run = math.gcd(*(len(list(same)) for _, same in itertools.groupby(numbers)))
        which = numbers[::run]
        own = [[row for row in rows if self.names[row] == name] for name in names]
        _say(kind.of.__name__, together, kind.dropout > 0)
        return RowGroup(
            kind, tuple(found[name] for name in names), tuple(self.numbers(rows, device) for rows in own), run,
            None if which == list(range(len(names))) else self.numbers(which, device), together,
        )  # fmt: skip

    def _sorted(self, rows: Sequence[int]) -> bool:
        """Whether the rows of each delta stand side by side."""
        stretches = [name for name, _ in itertools.groupby(self.names[row] for row in rows)]
        return len(stretches) == len(set(stretches))

    def numbers(self, values: Sequence[int], device: torch.device) -> Tensor:
        """These as int64 on the device, made once."""
        key = tuple(map(int, values)), device
        found = self._numbers.get(key)
        if found is None:
            if torch.compiler.is_compiling():
                return torch.tensor(key[0], device=device)
            with torch.inference_mode(False):  # a later pass of this route may want gradients
                found = self._numbers[key] = torch.tensor(key[0], device=device)
        return found


@functools.cache
def _say(kind: str, together: bool, dropout: bool) -> None:
    """What is computed one delta after the other, once. Of the kind's name alone: a kind holds modules of the base."""
    if not together:
        log.info("mixed batches: %s has no form by row, so its deltas run one after the other", kind)
    elif dropout:
        log.info(
            "mixed batches: %s with dropout draws for each delta, so in training its deltas run one after the other",
            kind,
        )  # fmt: skip
