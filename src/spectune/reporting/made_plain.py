"""A comparison with every text in it fit to be shown: its file may be of anybody's making."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from spectune.files.plain_text import clipped
from spectune.results.comparison_file import ComparisonResult

#: characters of a text
LONGEST = 4000


def made_plain(comparison: ComparisonResult) -> ComparisonResult:
    """The comparison itself where all its texts are plain and not too long, keys and unknown fields among them; else a
    copy in which they are so."""
    found: ComparisonResult = _plain(comparison)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        shown = clipped(value, LONGEST)
        return value if shown == value else shown
    if isinstance(value, BaseModel):
        fields = {**dict(value), **(value.model_extra or {})}
        changes = {name: new for name, old in fields.items() if (new := _plain(old)) is not old}
        known = {name: new for name, new in changes.items() if name in type(value).model_fields}
        copy = value.model_copy(update=known) if changes else value
        if others := changes.keys() - known.keys():
            extra = {name: changes.get(name, old) for name, old in (value.model_extra or {}).items()}
            assert others <= extra.keys()
            object.__setattr__(copy, "__pydantic_extra__", extra)
        return copy
    if isinstance(value, Mapping):
        made = {_plain(key): _plain(inner) for key, inner in value.items()}
        return made if any(new is not old for new, old in _pairs(made, value)) else value
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return type(value)(items) if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


def _pairs(made: Mapping[Any, Any], given: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """What became of each key and value; another number of keys is a change as well."""
    if len(made) != len(given):
        return [(made, given)]
    return [*zip(made, given, strict=True), *zip(made.values(), given.values(), strict=True)]
