"""The types and ranges of a line of `rows.jsonl`, whoever wrote it: what is summed, and what is shown."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spectune.evaluation.label_scores import AGREEMENT, CLASS_METRICS
from spectune.files.metadata import first_problem

#: statistics of a row, by metric of labels: see `spectune.evaluation.label_scores`
_LENGTHS = {"macro_f1": 3, "matthews": 3, "pearson": 6, "span_f1": 3, "token_accuracy": 2}
#: of a head; sums have three numbers for each
MOST_CLASSES = 10_000
_Value = Annotated[float, Field(ge=-1e100, le=1e100)]


class RowLine(BaseModel):
    """What earlier versions did not write may be missing; what was not finite is None."""

    model_config = ConfigDict(strict=True, extra="allow")

    row: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    origin: str | None = None
    loss_sum: _Value | None = None
    target_tokens: Annotated[float, Field(ge=0, lt=2**53)] | None = None
    metrics: dict[str, _Value | None] | None = None
    statistics: dict[str, list[_Value | None]] | None = None
    prompt: str | None = None
    prediction: str | None = None
    references: list[str] | None = None
    source: str | None = None

    @model_validator(mode="after")
    def _have_their_lengths(self) -> "RowLine":
        for name, values in (self.statistics or {}).items():
            if name not in AGREEMENT or not values:
                continue
            if len(values) != _LENGTHS[name]:
                raise ValueError(f"{name} has {len(values)} statistics, expected {_LENGTHS[name]}")
            if name in CLASS_METRICS and None not in values:
                label, predicted, classes = (float(value or 0) for value in values)
                if not 0 <= max(label, predicted) < classes <= MOST_CLASSES or min(label, predicted) < 0:
                    raise ValueError(f"{name} has the classes {label:g} and {predicted:g} of {classes:g}")
        return self


def check_row(row: dict[str, Any]) -> dict[str, Any]:
    """The line as it was read. Raises ValueError, on one line: a value is of another type, or out of range."""
    try:
        RowLine.model_validate(row)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error
    return row
