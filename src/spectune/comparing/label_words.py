"""Rows with labels as rows for a language model: the text asks, the label's words answer."""

import dataclasses
from collections.abc import Sequence

from spectune.data import Labels, Row
from spectune.data.head_labels import label_of
from spectune.errors import DataError

#: between a text and its label where no separator is given: the label of a text that ends in a word is no part of it
SEPARATOR = "\n"


def as_words(rows: Sequence[Row], labels: Labels) -> list[Row]:
    """Rows of `text` + `label` as prompts with choices, answered with the class's name; others as they are."""
    return [_asked(row, labels) if row.text is not None else row for row in rows]


def _asked(row: Row, labels: Labels) -> Row:
    label = label_of(row)
    name = None if label is None else labels.names[labels.number_of(label)]
    return dataclasses.replace(row, text=None, prompt=row.text, completion=name, label=name, choices=labels.names)


def check_same(one: Sequence[Row], other: Sequence[Row]) -> None:
    """Raises DataError: two kinds of model are judged on other rows, which would not compare."""
    if lost := {row.origin for row in one} ^ {row.origin for row in other}:
        raise DataError(
            f"{len(lost)} judged rows have something to learn as text or for a head, and not as the other: leave them "
            "out, so that all arms are judged on the same rows",
            sorted(lost)[:50],
        )
