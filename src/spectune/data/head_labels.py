"""What a head learns of rows: which of some classes a text is of, a number, or the class of each word."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectune.data.loading import Rows, bad_rows
from spectune.data.problem import RowProblem
from spectune.data.row_labels import (
    CAUSAL_LM,
    SEQ_CLS,
    TASK_TYPES,
    TOKEN_CLS,
    Label,
    label_of,
    label_problems,
    labels_of,
    task_type_of,
)
from spectune.data.shapes import Row
from spectune.errors import DataError, some

__all__ = [
    "CAUSAL_LM", "SEQ_CLS", "TASK_TYPES", "TOKEN_CLS", "Label", "Labels", "as_number", "classes_of_checkpoint",
    "find_labels", "label_of", "labels_of", "task_type_of",
]  # fmt: skip


@dataclass(frozen=True)
class Labels:
    """What a head of this task type has as its outputs: the classes in their order, or none for one number.

    Attributes:
        task_type: "SEQ_CLS" (a class or a number for a text) or "TOKEN_CLS" (a class for each word).
        names: of the classes; () is regression.
    """

    task_type: str
    names: tuple[str, ...] = ()

    @property
    def regression(self) -> bool:
        return not self.names

    @property
    def num_labels(self) -> int:
        return len(self.names) or 1

    @property
    def id2label(self) -> dict[int, str] | None:
        """As a model's config has it; None of a regression."""
        return dict(enumerate(self.names)) or None

    @property
    def load_options(self) -> dict[str, Any]:
        """How a base gets that head: arguments of `spectune.load`."""
        return {"task_type": self.task_type, "num_labels": self.num_labels, "id2label": self.id2label}

    @property
    def loss_unit(self) -> str:
        """What the loss of a head is given in."""
        if self.regression:
            return "squared error"
        return "nats per word" if self.task_type == TOKEN_CLS else "nats per row"

    def describe(self) -> str:
        """For a line that says what was decided: `SEQ_CLS: a head of 6 classes (abbreviation, entity, ...)`."""
        if self.regression:
            return f"{self.task_type}: a head of one number (regression)"
        what = "words" if self.task_type == TOKEN_CLS else "texts"
        return f"{self.task_type}: a head of {len(self.names)} classes of {what} ({some(self.names)})"

    def number_of(self, label: Label) -> int:
        """The class's number. Raises RowProblem: it is none of the classes."""
        name = str(label)
        if name in self.names:
            return self.names.index(name)
        if isinstance(label, int) and 0 <= label < len(self.names) and not any(n.isdigit() for n in self.names):
            return label  # the checkpoint has names for its numbers
        raise RowProblem(
            f"the label {label!r} is none of the classes {some(list(self.names))}; expected one that the training rows "
            "(or the checkpoint's id2label) have"
        )

    @classmethod
    def of_model(cls, task_type: str, config: Any) -> Labels | None:
        """Those that a loaded model's head has; None of a model with a language-model head."""
        if task_type == CAUSAL_LM:
            return None
        if task_type == SEQ_CLS and (config.num_labels == 1 or config.problem_type == "regression"):
            return cls(task_type)
        return cls(task_type, tuple(str(config.id2label[place]) for place in range(config.num_labels)))


def find_labels(rows: Sequence[Row], task_type: str, known: Mapping[int, str] | None = None) -> Labels | None:
    """The classes of training rows, sorted; or that their labels are numbers. None for CAUSAL_LM.

    Text and whole numbers are classes, numbers with a point are a regression, also where they are written as text (as
    a CSV has them).

    Args:
        known: the checkpoint's `id2label`, where it was trained for this; its order and its classes are kept.

    Raises:
        DataError: rows without a label, or with one of another kind than most; all of them at once. Or there is one
            class alone.
    """
    if task_type == CAUSAL_LM:
        return None
    problems = label_problems(rows, task_type)
    if problems and not (isinstance(rows, Rows) and rows.skip_bad_rows):
        raise bad_rows("the data", list(problems.values()), len(rows))
    good = [row for place, row in enumerate(rows) if place not in problems]
    given = [label for row in good for label in labels_of(row, task_type)]
    if task_type == SEQ_CLS and _are_measures(given):
        return Labels(task_type)
    return Labels(task_type, _classes(given, task_type, known or {}))


def classes_of_checkpoint(config: Any, task_type: str) -> dict[int, str]:
    """The classes that a checkpoint has been trained for, by its config; {} where it has no head of this kind."""
    ending = {SEQ_CLS: "ForSequenceClassification", TOKEN_CLS: "ForTokenClassification"}.get(task_type, "-")
    if not any(str(name).endswith(ending) for name in config.architectures or ()):
        return {}
    return {int(place): str(name) for place, name in (config.id2label or {}).items()}


def _classes(given: Iterable[Label], task_type: str, known: Mapping[int, str]) -> tuple[str, ...]:
    # a number stands in its own order, not in that of its digits
    ordered = sorted(set(given), key=lambda label: (label, "") if isinstance(label, int | float) else (0, label))
    names = tuple(dict.fromkeys(str(label) for label in ordered))
    of_checkpoint = tuple(str(known[place]) for place in sorted(known))
    numbers = all(isinstance(label, int) and 0 <= label < len(of_checkpoint) for label in ordered)
    if of_checkpoint and (set(names) <= set(of_checkpoint) or numbers):
        return of_checkpoint
    if len(names) < 2:
        raise DataError(f"all rows have the label {names[0]!r}; expected at least two classes" if names else _EMPTY)
    return names


_EMPTY = "no row has a label; expected one in each"


def _are_measures(labels: Sequence[Label]) -> bool:
    """Whether labels are numbers of which some have a point, written as numbers or all of them as text."""
    if labels and all(isinstance(label, str) for label in labels):
        numbers = [as_number(str(label)) for label in labels]
        return None not in numbers and any(isinstance(number, float) for number in numbers)
    return any(isinstance(label, float) for label in labels)


def as_number(text: str) -> int | float | None:
    """The number that a text is in JSON's writing; None where it is none, or not finite."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return found
