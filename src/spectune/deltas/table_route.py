"""A route whose rows read tables: operands of many deltas, stacked by slot on the device (`slot_tables`).

What runs under it asks for no delta by name, so that one recorded or compiled step serves any mixture of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from spectune.deltas.layout import Route
from spectune.deltas.modules import Kind
from spectune.errors import ConfigError


@dataclass(eq=False)
class Table:
    """Operands of modules of one kind at one site: by name, `[slots, ...]`. Those of slots that have no such module
    change nothing; or `acts`, boolean `[slots]`, says which do have one."""

    kind: Kind
    operands: dict[str, Tensor]
    acts: Tensor | None = None

    def chosen(self, index: Tensor) -> Chosen:
        """What rows with these slots are changed by. `index`: int64 `[rows]`."""
        operands = {name: table[index] for name, table in self.operands.items()}
        return Chosen(self.kind, operands, None if self.acts is None else self.acts[index][:, None, None])


class Chosen(NamedTuple):
    """The operands of each row of a batch."""

    kind: Kind
    operands: dict[str, Tensor]
    acts: Tensor | None

    def changed(self, sides: Sequence[Tensor]) -> Tensor:
        """The last of `sides`, each `[rows, tokens, features]`, with each row changed."""
        made = self.kind.by_row(self.operands, *sides)
        return made if self.acts is None else torch.where(self.acts, made, sides[-1])


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
        fixed: neither the index nor what its slots hold changes while there is this route: what a row reads is chosen
            once, and kept, as large as its delta for each row.
    """

    def __init__(self, names: Sequence[str | None] | None, index: Tensor, *, cached: bool, fixed: bool = False) -> None:
        super().__init__((None,) if names is None or cached else names, per_row=not cached, cached=cached)
        self.index, self.fixed = index, fixed
        self._chosen: dict[Table, Chosen] = {}

    def changed(self, tables: Sequence[Table], sides: Sequence[Tensor]) -> Tensor:
        """The last of `sides` (a module's input, and after it its output) with all changes of its tables. The first
        dimension of each is rows, or rows and tokens folded together. Raises ConfigError: it is neither."""
        given = sides[-1]
        if not tables:
            return given
        rows = self.index.shape[0]
        if any(side.shape[0] % rows for side in sides):
            raise ConfigError(
                f"{rows} rows read tables, and a module is given a tensor {list(given.shape)}, in which they cannot be "
                "told apart"
            )
        apart = given.dim() == 3 and given.shape[0] == rows
        before = [side if apart else side.reshape(rows, -1, side.shape[-1]) for side in sides[:-1]]
        now = given if apart else given.reshape(rows, -1, given.shape[-1])
        for table in tables:
            now = self._of(table).changed([*before, now])
        return now if apart else now.reshape(given.shape)

    def _of(self, table: Table) -> Chosen:
        if not self.fixed:
            return table.chosen(self.index)
        found = self._chosen.get(table)
        if found is None:
            found = self._chosen[table] = table.chosen(self.index)
        return found
