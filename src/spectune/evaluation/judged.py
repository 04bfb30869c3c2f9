"""What was measured of each row: a line each of `rows.jsonl`, and what follows from all of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from spectune.errors import DataError
from spectune.evaluation.corpus import corpus_score
from spectune.evaluation.label_scores import AGREEMENT, agreement
from spectune.evaluation.losses import by_source, mean_per_token
from spectune.evaluation.row_line import check_row
from spectune.files.metadata import read_lines
from spectune.files.strict_json import strict_json
from spectune.storage import atomic_write_text


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """One row under one model."""

    row: int
    """Its place among the task's rows, from 0."""
    origin: str
    """Where it came from: `file:line`."""
    loss_sum: float
    """Nats, summed over its target tokens; of a long text over all of its windows. NaN where it was not finite. Under a
    head nats of the row, or of its words together, or the squared error of its number."""
    target_tokens: int
    """Under a head what it has a loss of: 1, or its words."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Values whose mean over rows is the metric; none for a row that was neither written nor chosen."""
    statistics: dict[str, list[float]] = field(default_factory=dict)
    """Of `bleu` and `chrf` counts that are summed over rows, see `spectune.evaluation.corpus`; of metrics of labels
    those of `spectune.evaluation.label_scores`."""
    prompt: str | None = None
    prediction: str | None = None
    """What was written, without outer spaces; of choices the likeliest one, of a head its class, number, or tags."""
    references: tuple[str, ...] = ()
    """What it was compared with: as a model can write it, see `spectune.evaluation.asked`."""
    source: str | None = None
    """The name of the data file that it came from; None where the rows are of one file without a name of its own, and
    in files of versions that did not keep it."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "references": list(self.references)}

    @classmethod
    def from_dict(cls, given: Any) -> JudgedRow:
        """The row that `to_dict` wrote. Raises TypeError or ValueError if `given` is not one."""
        if not isinstance(given, dict):
            raise TypeError(f"{type(given).__name__}; expected an object")
        names = {item.name for item in fields(cls)}
        if unknown := set(given) - names:
            raise ValueError(f"unknown keys {sorted(unknown)}; expected some of {sorted(names)}")
        check_row(given)
        loss, references = given.get("loss_sum"), tuple(given.get("references", ()))
        return cls(**{**given, "loss_sum": math.nan if loss is None else float(loss), "references": references})


def write_rows(path: str | Path, judged: Sequence[JudgedRow]) -> None:
    """Write one JSON object a line, atomically; a number that is not finite becomes null."""
    atomic_write_text(path, "".join(strict_json(row.to_dict(), indent=None) + "\n" for row in judged))


def read_rows(path: str | Path) -> list[JudgedRow]:
    """The rows that `write_rows` wrote. Raises DataError, `file:line`, where one is damaged."""
    rows = []
    for number, line in read_lines(Path(path), what="a judged row"):
        try:
            rows.append(JudgedRow.from_dict(line))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a judged row: {error}") from error
    return rows


def judged_loss(judged: Sequence[JudgedRow]) -> float:
    """Nats per target token over all rows: every token weighs the same, whichever row it stands in. Raises DataError:
    no row, or none with a target token."""
    if not any(row.target_tokens for row in judged):
        raise DataError(f"{len(judged)} judged rows without a target token; expected at least one")
    return mean_per_token([row.loss_sum for row in judged], [row.target_tokens for row in judged])


def loss_by_source(judged: Sequence[JudgedRow]) -> dict[str, float]:
    """Nats per target token over the rows of each source that has any, in the order of the rows; {} where there is but
    one source, or none is known."""
    columns = [row.source for row in judged], [row.loss_sum for row in judged], [row.target_tokens for row in judged]
    return by_source(*columns)


def corpus_metrics(judged: Sequence[JudgedRow]) -> dict[str, float]:
    """Each metric over the rows that have it: the mean of their values, or the score of their summed statistics."""
    values, counts = defaultdict[str, list[float]](list), defaultdict[str, list[list[float]]](list)
    for row in judged:
        for name, value in row.metrics.items():
            values[name].append(value)
        for name, statistics in row.statistics.items():
            counts[name].append(statistics)
    found = {name: math.fsum(of_rows) / len(of_rows) for name, of_rows in values.items()}
    labels = {name: agreement(name, rows) for name, rows in counts.items() if name in AGREEMENT}
    texts = {
        name: corpus_score(name, [*map(sum, zip(*rows, strict=True))])
        for name, rows in counts.items()
        if name not in AGREEMENT
    }
    return found | labels | texts
