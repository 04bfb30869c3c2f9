"""Which delta each row of a batch uses: the route as it was asked for, and laid over one batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from spectune.compute.pack_layout import Pack
from spectune.errors import ConfigError


class Route:
    """One delta (or None, the bare base) for all rows of any batch, or one for each row of batches of one size."""

    def __init__(self, names: Iterable[str | None], *, per_row: bool) -> None:
        self.names = tuple(names)
        self.per_row = per_row
        #: rows of one batch differ
        self.mixed = any(name != self.names[0] for name in self.names)

    @classmethod
    def of(cls, name: str | None) -> Route:
        """One delta, or the bare base, for all rows."""
        return cls((name,), per_row=False)

    @property
    def name(self) -> str | None:
        """The one delta of all rows. Only where the route is not mixed."""
        assert not self.mixed, "a mixed route has no single name"
        return self.names[0]

    def __repr__(self) -> str:
        return f"Route({list(self.names) if self.per_row else self.names[0]!r})"


class Rows:
    """A route over one batch, as it is while one forward pass runs.

    Attributes:
        route: where it comes from.
        names: the delta of each row, `batch` of them.
        groups: each delta of the batch with its rows' indices; the bare base's rows are in none.
        length: tokens of a row in this pass, virtual ones included; None where that is not known (a part of the model
            was called by itself).
        lead: places of this pass that stand before its text, for virtual tokens of any row.
        seen: text tokens in the cache before this pass.
        padding: padding tokens on the left of each row, `[batch, 1]`; None where there is no mask to tell.
        pack: the documents of a packed batch, virtual tokens included; None for one document in each row.
    """

    def __init__(self, route: Route, batch: int, *, copies: int = 1) -> None:
        """
        Args:
            copies: rows that generation makes of each row (beams, return sequences), next to each other.

        Raises:
            ConfigError: the route names another number of rows.
        """
        names = route.names if route.per_row else route.names * batch
        if route.per_row:
            names = tuple(name for name in names for _ in range(copies))
        if len(names) != batch:
            raise ConfigError(
                f"the route names a delta for each of {len(route.names)} rows"
                + (f", {copies} copies each," if copies > 1 else "")
                + f" and this batch has {batch} rows; give one name (or None) for each row, or a single one for all"
            )
        self.route = route
        self.names = names
        # the decoder's entry writes these down, once it knows what stands before the text
        self.length: int | None = None
        self.lead = 0
        self.seen = 0
        self.padding: Tensor | None = None
        self.pack: Pack | None = None
        self.groups = tuple(
            (name, tuple(row for row, other in enumerate(names) if other == name))
            for name in dict.fromkeys(names)
            if name is not None
        )

    def picks(self, rows: tuple[int, ...], tensor: Tensor, path: str) -> Tensor:
        """Indices along the first dimension of `tensor` that belong to `rows`: int64, on its device.

        Args:
            tensor: `[batch, ...]` or `[batch * length, features]`.

        Raises:
            ConfigError: it is neither, so that rows cannot be told apart.
        """
        batch, first = len(self.names), tensor.shape[0]
        index = torch.tensor(rows, device=tensor.device)
        flat = tensor.dim() == 2 and first != batch
        if not flat and first == batch:
            return index
        length = first // batch if self.length is None else self.length
        if not flat or first != batch * length:
            raise ConfigError(
                f"{path} is given a tensor {list(tensor.shape)}, in which {batch} rows"
                + (f" of {self.length} tokens" if self.length is not None else "")
                + " cannot be told apart: deltas at this place cannot share a batch with others. Route each of them "
                "in a batch of its own."
            )
        return (index[:, None] * length + torch.arange(length, device=tensor.device)).flatten()
