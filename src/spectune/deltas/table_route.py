"""A route whose rows read tables: operands of many deltas, stacked by slot on the device (`slot_tables`).

What runs under it asks for no delta by name, so that one recorded or compiled step serves any mixture of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from spectune.deltas.device_numbers import DeviceNumbers
from spectune.deltas.layout import Route
from spectune.deltas.modules import Kind, Operands
from spectune.deltas.row_groups import Arrangement, SiteRows, arranged, by_runs, runs_of
from spectune.errors import ConfigError


@dataclass(eq=False)
class Table:
    """Operands of modules of one kind at one site: by name, `[slots, ...]`. Those of slots that have no such module
    change nothing; or `acts`, boolean `[slots]`, says which do have one.

    Attributes:
        filled: the slots that have one, as the host knows them.
    """

    kind: Kind
    operands: dict[str, Tensor]
    acts: Tensor | None = None
    filled: set[int] = field(default_factory=set)

    def changed(self, index: Tensor, sides: Sequence[Tensor]) -> Tensor:
        """The last of `sides`, each `[rows, tokens, features]`, with each row changed by its slot, in operations that
        are the same whichever these are. `index`: int64 `[rows]`."""
        made = self.kind.by_row(self.chosen(index), *sides)
        return made if self.acts is None else torch.where(self.acts[index][:, None, None], made, sides[-1])

    def chosen(self, index: Tensor) -> Operands:
        """The operands of these slots, int64 `[rows]`, copied."""
        return {
            # as it lies in memory
            name: table.index_select(0, index) if table.is_contiguous() else table.mT.index_select(0, index).mT
            for name, table in self.operands.items()
        }


class TablePart:
    """Rows of a batch that read one table, `run` side by side the same slot. `kept`: what they read stays chosen."""

    def __init__(self, table: Table, run: int, which: Sequence[int], numbers: DeviceNumbers, *, kept: bool) -> None:
        self.table, self.numbers, self.kept = table, numbers, kept
        self.run, self.which = run, which
        self._chosen: Operands | None = None

    def changed(self, sides: Sequence[Tensor], picked: object) -> list[Tensor]:
        """See `row_groups.Part`."""
        chosen = self._operands() if self._chosen is None else self._chosen
        if self.kept:
            self._chosen = chosen
        return [by_runs(self.table.kind, chosen, self.run, sides)]

    def _operands(self) -> Operands:
        first, last = self.which[0], self.which[-1] + 1
        if self.which == list(range(first, last)):  # as they lie
            return {name: tensor[first:last] for name, tensor in self.table.operands.items()}
        return self.table.chosen(self.numbers.whole(next(iter(self.table.operands.values())).device, self.which))


class KeepsDeltas(Protocol):
    """Tables, as what detaches deltas and counts memory knows them."""

    @property
    def nbytes(self) -> int: ...

    def keeps(self, name: str) -> bool: ...


#: the tables of each side of a module, by its path and whether they act before it
SiteTables = Mapping[tuple[str, bool], tuple[Table, ...]]


class TableRoute(Route):
    """Rows that read tables by slot. Where it is `cached`, nothing but tables acts.

    Attributes:
        index: the slot of each row, int64 `[rows]`.
        slots: the same, where the host knows them and neither they nor what they hold changes while there is this
            route: each kind then computes the rows that have it. None: every kind computes every row.
        kept: with `slots`: what a row reads is chosen once, and kept, as large as its delta for each row.
        one_token: rows have one each, and `index` may be of more rows than a pass has: its first ones are theirs. What
            is compiled for two numbers of rows then serves any.
    """

    def __init__(
        self, names: Sequence[str | None] | None, index: Tensor, *, cached: bool, slots: Sequence[int] | None = None,
        kept: bool = False, one_token: bool = False,
    ) -> None:  # fmt: skip
        super().__init__((None,) if names is None or cached else names, per_row=not cached, cached=cached)
        self.index, self.slots, self.kept = index, None if slots is None else tuple(slots), kept
        self.one_token = one_token
        self._numbers = DeviceNumbers()
        self._sites: dict[tuple[Table, ...], SiteRows | None] = {}
        # of sites where the same rows have something, and of the same rows: many a site is like others
        self._arrangements: dict[tuple[int | None, ...], Arrangement[int]] = {}
        self._runs: dict[tuple[int, ...], tuple[int, list[int]]] = {}

    def changed(self, tables: tuple[Table, ...], sides: Sequence[Tensor]) -> Tensor:
        """The last of `sides` (a module's input, and after it its output) with all changes of its tables. The first
        dimension of each is rows, or rows and tokens folded together. Raises ConfigError: it is neither."""
        given = sides[-1]
        found = None if self.slots is None else self._rows(tables, self.slots)
        if not tables or (self.slots is not None and found is None):
            return given
        rows = given.shape[0] if self.one_token else self.index.shape[0]
        if any(side.shape[0] % rows for side in sides):
            raise ConfigError(
                f"{rows} rows read tables, and a module is given a tensor {list(given.shape)}, in which they cannot be "
                "told apart"
            )
        apart = given.dim() == 3 and given.shape[0] == rows
        before = [side if apart else side.reshape(rows, -1, side.shape[-1]) for side in sides[:-1]]
        now = given if apart else given.reshape(rows, -1, given.shape[-1])
        if found is not None:
            now = found.changed([*before, now])
        else:
            index = self.index[:rows] if self.one_token else self.index
            for table in tables:
                now = table.changed(index, [*before, now])
        return now if apart else now.reshape(given.shape)

    def _rows(self, tables: tuple[Table, ...], slots: tuple[int, ...]) -> SiteRows | None:
        """Which rows read which of the tables of a site; None where none does."""
        if tables in self._sites:
            return self._sites[tables]
        of_slot = {slot: number for number, table in enumerate(tables) for slot in table.filled}
        kinds = tuple(of_slot.get(slot) for slot in slots)
        if all(kind is None for kind in kinds):
            self._sites[tables] = None
            return None
        if kinds not in self._arrangements:
            numbers = functools.partial(self._numbers.whole, self.index.device)
            self._arrangements[kinds] = arranged(kinds, slots, numbers)

        def part(number: int, rows: tuple[int, ...]) -> TablePart:
            if rows not in self._runs:
                self._runs[rows] = runs_of([slots[row] for row in rows])
            return TablePart(tables[number], *self._runs[rows], self._numbers, kept=self.kept)

        made = self._sites[tables] = self._arrangements[kinds].at_site(part)
        return made
