"""Parts of result files, which older and newer versions of spectune write too."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from spectune.files.atomic import atomic_write_text
from spectune.files.metadata import AGAIN, read_record, sealed
from spectune.files.strict_json import strict_json


def _within(least: float, most: float) -> AfterValidator:
    """Numbers that are not finite are what was not measured, and no file has any."""

    def check(value: float) -> float:
        if math.isfinite(value) and not least <= value <= most:
            raise ValueError(f"{value:g} is out of range, expected a number from {least:g} to {most:g}")
        return value

    return AfterValidator(check)


#: how many, and how long: no sum of them overflows, whoever wrote them
Count = Annotated[int, Field(ge=0, le=2**60)]
Seconds = Annotated[float, _within(0, 1e12)]
#: a loss, a speed, a difference: their squares are numbers still
Measure = Annotated[float, _within(-1e100, 1e100)]


class Record(BaseModel):
    """A part of a result file. A key that is missing or null has its default, an unknown one is kept as it is."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_missing(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        fields = cls.model_fields

        def kept(key: str, value: Any) -> bool:
            return value is not None or key not in fields or fields[key].is_required() or fields[key].default is None

        return {key: value for key, value in content.items() if kept(key, value)}

    def to_dict(self) -> dict[str, Any]:
        """The content for a JSON file: what was read or set, no defaults."""
        return self.model_dump(mode="json", exclude_unset=True)

    def write(self, path: Path) -> None:
        """Write `to_dict` as JSON with its seal, atomically; a number that is not finite becomes null."""
        atomic_write_text(path, strict_json(sealed(self.to_dict())) + "\n")

    @classmethod
    def read(
        cls, path: Path, *, what: str = "", again: str = AGAIN, warn: Callable[[str], None] | None = None
    ) -> Self | None:
        """What `write` wrote; None where there is no file. Raises DataError as
        `spectune.files.metadata.read_record`."""
        return read_record(path, cls, what=what, again=again, warn=warn)
