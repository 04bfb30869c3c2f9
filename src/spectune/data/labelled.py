"""One text for a head: token ids, and what is learned of them."""

from array import array
from collections.abc import Sequence
from typing import Any

from spectune.data.example import Example
from spectune.data.shapes import Row

IGNORED = -100


class LabelledExample(Example):
    """One text with its label, or with a class for each of its words. No token of it is a target.

    Attributes:
        label: of the text: a class's number, or a number to be found; None where words have classes.
        places: of the words' first tokens; `classes` has the number of each word's class.
        words: their places among the row's own words; those of a text that was cut are fewer.
    """

    __slots__ = ("classes", "label", "places", "words")

    def __init__(
        self, input_ids: Sequence[int], row: Row, *, label: int | float | None = None, places: Sequence[int] = (),
        classes: Sequence[int] = (), words: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__(input_ids, len(input_ids), row)
        self.label = label
        self.places, self.classes, self.words = array("i", places), array("i", classes), array("i", words)

    @property
    def target_tokens(self) -> int:
        """What has a loss: the text, or its words."""
        return len(self.places) if self.label is None else 1

    def token_labels(self) -> list[int]:
        """The class's number at each word's first token, -100 elsewhere."""
        found = [IGNORED] * self.length
        for place, number in zip(self.places, self.classes, strict=True):
            found[place] = number
        return found

    def tobytes(self) -> bytes:
        own = repr((self.label, self.places.tolist(), self.classes.tolist())).encode()
        return own + super().tobytes()

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, LabelledExample):
            return NotImplemented
        mine, theirs = ((one.label, one.places, one.classes, one.words) for one in (self, other))
        return mine == theirs and super().__eq__(other)

    __hash__ = None

    def __repr__(self) -> str:
        own = f"label={self.label}, places={self.places.tolist()}, classes={self.classes.tolist()}"
        return f"LabelledExample({self.input_ids}, {self.row!r}, {own})"
