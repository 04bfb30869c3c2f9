"""Which delta each row of a batch uses: the route as it was asked for, and how it lies over one batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectune.compute.pack_layout import Pack
from spectune.deltas.row_groups import Grouping
from spectune.errors import ConfigError


class Route:
    """One delta (or None, the bare base) for all rows of any batch, or one for each row of batches of one size.

    `cached`: virtual tokens and prefixes are in the cache already, and positions and masks are the caller's."""

    def __init__(self, names: Iterable[str | None], *, per_row: bool, cached: bool = False) -> None:
        self.names = tuple(names)
        self.per_row = per_row
        self.cached = cached
        #: rows of one batch differ
        self.mixed = any(name != self.names[0] for name in self.names)
        #: no row has a delta
        self.bare = not any(self.names) and None in self.names
        self._groupings: dict[tuple[str | None, ...], Grouping] = {}
        self._deltas: tuple[object, ...] = ()

    @classmethod
    def of(cls, name: str | None) -> Route:
        """One delta, or the bare base, for all rows."""
        return cls((name,), per_row=False)

    @property
    def name(self) -> str | None:
        """The one delta of all rows. Only where the route is not mixed."""
        assert not self.mixed, "a mixed route has no single name"
        return self.names[0]

    def over(self, batch: int, copies: int = 1) -> tuple[str | None, ...]:
        """The delta of each of `batch` rows. `copies`: rows that generation makes of each row (beams, return
        sequences), next to each other. Raises ConfigError: the route names another number of rows."""
        if not self.per_row:
            return self.names * batch
        names = tuple(name for name in self.names for _ in range(copies))
        if len(names) != batch:
            raise ConfigError(
                f"the route names a delta for each of {len(self.names)} rows"
                + (f", {copies} copies each," if copies > 1 else "")
                + f" and this batch has {batch} rows; give one name (or None) for each row, or a single one for all"
            )
        return names

    def grouping(self, names: tuple[str | None, ...]) -> Grouping:
        """How batches of rows with these deltas, which `over` gave, are grouped. Made once for the deltas that names
        mean (`means`)."""
        found = self._groupings.get(names)
        if found is None:
            found = self._groupings[names] = Grouping(names)
        return found

    def means(self, deltas: tuple[object, ...]) -> None:
        """Note the deltas that its names mean in the pass that begins: a task may have taken the route along out of its
        `with`, and others have these names by then."""
        if deltas != self._deltas:
            self._deltas, self._groupings = deltas, {}

    def __repr__(self) -> str:
        return f"Route({list(self.names) if self.per_row else self.names[0]!r})"


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """A route over the batch of one forward pass. It is frozen: recomputation uses the one of its forward pass.

    Attributes:
        route: where it comes from.
        names: the delta of each row.
        length: tokens of a row in this pass, virtual ones included; None where that is not known (a part of the model
            was called by itself).
        virtual: places of this pass that stand before its text, for virtual tokens of any row.
        seen: text tokens in the cache before this pass.
        padding: padding tokens on the left of each row, `[batch, 1]` int64; None where no mask says so.
        pack: the documents of a packed batch, virtual tokens included; None for one document in each row.
        grouping: its rows by delta, at every site.
    """

    route: Route
    names: tuple[str | None, ...]
    length: int | None = None
    virtual: int = 0
    seen: int = 0
    padding: Tensor | None = None
    pack: Pack | None = None
    grouping: Grouping = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grouping", self.route.grouping(self.names))

    def apart(self, tensor: Tensor, path: str) -> Tensor:
        """`tensor` as `[batch, tokens, features]`. `tensor`: `[batch, ..., features]` or `[batch * length, features]`,
        of the module at `path`. Raises ConfigError: it is neither, so that rows cannot be told apart."""
        batch, first = len(self.names), tensor.shape[0]
        if first != batch:
            length = first // batch if self.length is None else self.length
            if tensor.dim() != 2 or first != batch * length:
                raise ConfigError(
                    f"{path} is given a tensor {list(tensor.shape)}, in which {batch} rows"
                    + (f" of {self.length} tokens" if self.length is not None else "")
                    + " cannot be told apart: deltas at this place cannot share a batch with others. Route each of "
                    "them in a batch of its own."
                )
        return tensor.reshape(batch, -1, tensor.shape[-1])

    def picks(self, rows: Tensor, tensor: Tensor) -> Tensor:
        """Indices along the first dimension of `tensor` that belong to `rows`: int64, on its device. `tensor`: as
        `apart` takes it."""
        batch, first = len(self.names), tensor.shape[0]
        if first == batch:
            return rows
        length = first // batch
        return (rows[:, None] * length + torch.arange(length, device=tensor.device)).flatten()
