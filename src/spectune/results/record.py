"""Parts of result files, which older and newer versions of spectune write too."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from spectune.files.atomic import atomic_write_text
from spectune.files.strict_json import strict_json


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
        """Write `to_dict` as JSON, atomically; a number that is not finite becomes null."""
        atomic_write_text(path, strict_json(self.to_dict()) + "\n")


def first_problem(error: ValidationError) -> str:
    """What is wrong with a file's content, on one line: the first place, and how many more there are."""
    first, *others = error.errors(include_url=False, include_input=False)
    place = ".".join(map(str, first["loc"]))
    more = f", and {len(others)} more like it" if others else ""
    return f"{place}: {first['msg']}{more}" if place else f"{first['msg']}{more}"
