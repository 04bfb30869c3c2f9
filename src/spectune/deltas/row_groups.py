"""The rows of one batch at one site: whose modules act on which, and how those of one kind are computed together."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from spectune.deltas.device_numbers import DeviceNumbers
from spectune.deltas.modules import Kind, Operands, SideModule
from spectune.deltas.stacking import Stacking

log = logging.getLogger("spectune")
#: what a module makes of its own rows by themselves
Picked = Callable[[SideModule, Tensor], Tensor]
K = TypeVar("K", bound=Hashable)


class Part(Protocol):
    """Rows of a batch that are computed together."""

    def changed(self, sides: Sequence[Tensor], picked: Picked | None) -> list[Tensor]:
        """The last of `sides`, changed, in one tensor or several one after the other. `sides`: as `Kind.by_row` has
        them, of these rows."""


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
        stack: lays their operands together.
    """

    kind: Kind
    modules: tuple[SideModule, ...]
    own: tuple[Tensor, ...]
    run: int
    which: Tensor | None
    together: bool
    stack: Stacking

    def one_by_one(self) -> bool:
        """Whether each delta's rows are computed by themselves now."""
        return not self.together or bool(self.kind.dropout and any(module.training for module in self.modules))

    def changed(self, sides: Sequence[Tensor], picked: Picked | None) -> list[Tensor]:
        """See `Part`."""
        if self.one_by_one():
            assert picked is not None, "modules are called"
            return [picked(*pair) for pair in zip(self.modules, self.own, strict=True)]
        operands = self.kind.of.stacked(self.modules, self.stack)
        if self.which is not None:
            operands = {name: tensor.index_select(0, self.which) for name, tensor in operands.items()}
        return [by_runs(self.kind, operands, self.run, sides)]


def by_runs(kind: Kind, operands: Operands, run: int, sides: Sequence[Tensor]) -> Tensor:
    """The last of `sides`, changed, where each set of operands is for `run` rows side by side."""
    if run == 1:
        return kind.by_row(operands, *sides)
    rows, tokens, features = sides[-1].shape
    folded = [side.reshape(rows // run, run * tokens, side.shape[-1]) for side in sides]
    return kind.by_row(operands, *folded).view(rows, tokens, features)


@dataclass(frozen=True, eq=False)
class SiteRows:
    """The rows of a batch at one site, side by side by group.

    Attributes:
        parts: the groups, in this order; None are rows that nothing acts on.
        sizes: rows of each part.
        order: for each row in this order its number in the batch, int64; None where it is the batch's own order.
        back: the inverse.
    """

    parts: tuple[Part | None, ...]
    sizes: tuple[int, ...]
    order: Tensor | None
    back: Tensor | None

    def changed(self, sides: Sequence[Tensor], picked: Picked | None = None) -> Tensor:
        """The last of `sides` with each row changed by its own delta. `sides`: as `Kind.by_row` has them, of the whole
        batch. `picked`: where modules may be called."""
        if self.order is not None:
            sides = [side.index_select(0, self.order) for side in sides]
        # a cut and a joint are one copy, forward and backward, however many parts there are
        cut = [side.split_with_sizes(self.sizes) if len(self.sizes) > 1 else (side,) for side in sides]
        made: list[Tensor] = []
        for group, *part in zip(self.parts, *cut, strict=True):
            made += [part[-1]] if group is None else group.changed(part, picked)
        joined = torch.cat(made) if len(made) > 1 else made[0]
        return joined if self.back is None else joined.index_select(0, self.back)


@dataclass(frozen=True, eq=False)
class Arrangement(Generic[K]):
    """Rows of a batch side by side by kind.

    Attributes:
        stretches: a kind, None where nothing acts, and the numbers of its rows.
        order, back: as `SiteRows` has them.
    """

    stretches: tuple[tuple[K | None, tuple[int, ...]], ...]
    order: Tensor | None
    back: Tensor | None

    def at_site(self, part: Callable[[K, tuple[int, ...]], Part]) -> SiteRows:
        """`part`: made of a kind and the numbers of its rows."""
        return SiteRows(
            tuple(None if kind is None else part(kind, rows) for kind, rows in self.stretches),
            tuple(len(rows) for _, rows in self.stretches),
            self.order,
            self.back,
        )


def arranged(
    kinds: Sequence[K | None], deltas: Sequence[Hashable], numbers: Callable[[Sequence[int]], Tensor], *,
    sorts: Callable[[K], bool] = lambda _: False,
) -> Arrangement[K]:  # fmt: skip
    """Rows of a batch side by side by kind.

    Args:
        kinds: of each row; None where nothing acts.
        deltas: of each row.
        numbers: puts numbers on the site's device.
        sorts: whether the rows of each delta of this kind have to stand side by side.
    """
    # stretches of the batch as it is, where each kind is one of them
    stretches = [
        (kind, tuple(row for row, _ in rows))
        for kind, rows in itertools.groupby(enumerate(kinds), lambda each: each[1])
    ]
    acting = [kind for kind, _ in stretches if kind is not None]
    in_order = len(acting) == len(set(acting)) and not any(
        kind is not None and sorts(kind) and not _sorted([deltas[row] for row in rows]) for kind, rows in stretches
    )
    if not in_order:
        stretches = [
            (kind, tuple(sorted(rows, key=lambda row: deltas.index(deltas[row]))))
            for kind in (None, *dict.fromkeys(acting))
            if (rows := [row for row, own in enumerate(kinds) if own == kind])
        ]
    order = [row for _, rows in stretches for row in rows]
    back = sorted(range(len(order)), key=order.__getitem__)
    return Arrangement(tuple(stretches), None if in_order else numbers(order), None if in_order else numbers(back))


def runs_of(which: Sequence[int]) -> tuple[int, list[int]]:
    """One set of operands for as many rows side by side as divide all runs of one delta: their number, and whose each
    set is. `which`: the delta of each row."""
    run = math.gcd(*(len(list(same)) for _, same in itertools.groupby(which)))
    return run, list(which[::run])


def _sorted(deltas: Sequence[Hashable]) -> bool:
    """Whether the rows of each delta stand side by side."""
    stretches = [delta for delta, _ in itertools.groupby(deltas)]
    return len(stretches) == len(set(stretches))


class Grouping:
    """Batches whose rows have these deltas, at every site. What it makes it makes once, before blocks run: compiled and
    captured ones find tensors only. `names`: the delta of each row."""

    def __init__(self, names: tuple[str | None, ...]) -> None:
        self.names = names
        self.sites: dict[tuple[str, str], SiteRows | None] = {}
        self.numbers = DeviceNumbers()

    def make(self, site: tuple[str, str], found: Mapping[str, SideModule], stack: Stacking) -> SiteRows | None:
        """The groups at a site, given the modules of the batch's deltas there, by name; None where there are none.
        `stack`: of all batches of a model."""
        kinds: dict[Kind, list[str]] = {}
        for name, module in found.items():
            kinds.setdefault(module.alike(), []).append(name)
        made = self.sites[site] = self._rows(kinds, found, stack) if kinds else None
        return made

    def _rows(
        self, kinds: Mapping[Kind, list[str]], found: Mapping[str, SideModule], stack: Stacking
    ) -> SiteRows:  # fmt: skip
        with torch.no_grad():
            together = {kind for kind, names in kinds.items() if found[names[0]].has_row_form()}
        of_name = {name: kind for kind, names in kinds.items() for name in names}
        device = next(iter(found.values())).device
        made = arranged(
            [of_name.get(name or "") for name in self.names],
            self.names,
            functools.partial(self.numbers.whole, device),
            sorts=lambda kind: bool(kind.dropout) or kind not in together,
        )
        return made.at_site(lambda kind, rows: self._group(kind, rows, found, device, kind in together, stack))

    def _group(
        self, kind: Kind, rows: Sequence[int], found: Mapping[str, SideModule], device: torch.device, together: bool,
        stack: Stacking,
    ) -> RowGroup:  # fmt: skip
        # in the order in which they come: where each has one run there is nothing to choose
        names = [name for name in dict.fromkeys(self.names[row] for row in rows) if name is not None]
        numbers = [names.index(self.names[row]) for row in rows]  # type: ignore[arg-type]
        run, which = runs_of(numbers)
        own = [[row for row in rows if self.names[row] == name] for name in names]
        _say(kind.of.__name__, together, kind.dropout > 0)
        return RowGroup(
            kind, tuple(found[name] for name in names), tuple(self.numbers.whole(device, rows) for rows in own), run,
            None if which == list(range(len(names))) else self.numbers.whole(device, which), together, stack,
        )  # fmt: skip


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
