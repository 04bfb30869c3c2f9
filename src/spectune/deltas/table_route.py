"""A route whose rows read tables: operands of many deltas, stacked by slot on the device (`slot_tables`).

What runs under it asks for no delta by name, so that one recorded or compiled step serves any mixture of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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

    def changed(self, index: Tensor, sides: Sequence[Tensor]) -> Tensor:
        """The last of `sides`, each `[rows, tokens, features]`, with each row changed by its slot. `index`: int64
        `[rows]`."""
        made = self.kind.by_row({name: table[index] for name, table in self.operands.items()}, *sides)
        return made if self.acts is None else torch.where(self.acts[index][:, None, None], made, sides[-1])


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
    """

    def __init__(self, names: Sequence[str | None] | None, index: Tensor, *, cached: bool) -> None:
        super().__init__((None,) if names is None or cached else names, per_row=not cached, cached=cached)
        self.index = index

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
        before = [side.reshape(rows, -1, side.shape[-1]) for side in sides[:-1]]
        now = given.reshape(rows, -1, given.shape[-1])
        for table in tables:
            now = table.changed(self.index, [*before, now])
        return now.reshape(given.shape)
