"""The shape of a batch: all that a plan has to know of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A batch of `rows` of at most `length` tokens.

    Attributes:
        targets: tokens with a loss of the row that has most.
        all_targets: those of all rows.
        padded: some rows are shorter than others, so that attention has a mask.
        columns: positions that predict a target in some row; None is all of them. It counts only where a model's head
            is no plain linear and its `logits_to_keep` takes positions that all rows share.
        documents: tokens of the documents of each row, where it is a pack of them.
        kernel: how these are attended (`compute.pack_layout.Kernel`); None is by masks.
    """

    rows: int
    length: int
    targets: int
    all_targets: int
    padded: bool = False
    columns: int | None = None
    documents: tuple[tuple[int, ...], ...] | None = None
    kernel: Any = None

    @classmethod
    def whole(cls, rows: int, length: int) -> Shape:
        """Rows of one length, in which every token but the first has a loss."""
        return cls(rows, length, length - 1, rows * (length - 1))

    def resized(self, rows: int, length: int) -> Shape:
        """A batch of another size with the same share of targets, as many in each row. Packs become plain rows."""
        targets = max(1, round(self.targets / (self.length - 1) * (length - 1)))
        columns = None if self.columns is None else max(1, round(self.columns * (length - 1) / (self.length - 1)))
        return Shape(rows, length, targets, rows * targets, self.padded, columns)

    def cut(self, length: int) -> Shape:
        """The same rows, cut to at most `length` tokens."""
        if length >= self.length:
            return self
        targets = min(self.targets, length - 1)
        return replace(self, length=length, targets=targets, all_targets=min(self.all_targets, self.rows * targets))
