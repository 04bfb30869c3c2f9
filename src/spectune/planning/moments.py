"""The parts of a step where its memory is largest, by term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: what the bytes of a step are for
TERMS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")


@dataclass(frozen=True)
class Moment:
    """One part of a step where it is largest: bytes by term, all at once."""

    name: str
    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())
