"""One encoded sequence: token ids, and which of them are learned."""

import itertools
from array import array
from collections.abc import Sequence
from typing import Any

from spectune.data.shapes import Row


class Example:
    """One sequence. The ids are kept as 32-bit integers: a million rows fit in memory.

    Attributes:
        prompt_length: ids from this one on are learned (0: all but the first, before which nothing stands), but for
        masked: stretches behind it that are not, `(start, stop)` each, ascending: later prompts of a conversation.
        row: what it was made of.
    """

    __slots__ = ("_ids", "masked", "prompt_length", "row")

    def __init__(
        self, input_ids: Sequence[int], prompt_length: int, row: Row, masked: Sequence[tuple[int, int]] = ()
    ) -> None:
        self._ids = array("i", input_ids)
        self.prompt_length, self.row = prompt_length, row
        self.masked = tuple(masked)

    @classmethod
    def of_spans(cls, ids: Sequence[int], learned: Sequence[tuple[int, int]], row: Row) -> "Example":
        """The example that ends with the last of the learned spans, which are ascending."""
        gaps = ((a, b) for (_, a), (b, _) in itertools.pairwise(learned))
        return cls(ids[: learned[-1][1]], learned[0][0], row, tuple(gap for gap in gaps if gap[0] < gap[1]))

    @property
    def input_ids(self) -> list[int]:
        return self._ids.tolist()

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self._ids)

    @property
    def last_id(self) -> int:
        return self._ids[-1]

    @property
    def targets(self) -> tuple[tuple[int, int], ...]:
        """The learned stretches, `(start, stop)` each."""
        starts = (self.prompt_length, *(stop for _, stop in self.masked))
        stops = (*(start for start, _ in self.masked), len(self._ids))
        return tuple(zip(starts, stops, strict=True))

    @property
    def answer_start(self) -> int:
        """Where the last learned stretch begins."""
        return self.masked[-1][1] if self.masked else self.prompt_length

    @property
    def target_tokens(self) -> int:
        """Tokens with a loss. The first token of a sequence has none: nothing stands before it."""
        return len(self._ids) - max(self.prompt_length, 1) - sum(stop - start for start, stop in self.masked)

    def tobytes(self) -> bytes:
        """All that training sees of it, for digests."""
        return repr((self.prompt_length, self.masked, len(self._ids))).encode() + self._ids.tobytes()

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Example):
            return NotImplemented
        return (self._ids, self.prompt_length, self.masked, self.row) == (
            other._ids,
            other.prompt_length,
            other.masked,
            other.row,
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Example({self.input_ids}, {self.prompt_length}, {self.row!r}, {self.masked})"
