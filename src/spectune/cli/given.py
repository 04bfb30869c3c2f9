"""Values that the user gave, each with its place, made into a config; what is wrong with one is said with its place."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Given:
    """A value and where the user gave it: `run.yaml:3` or `--set`.

    Attributes:
        words: the value with each number as it was written, for settings that are text: `010` is no 10 there. None
            where there is no number in it.
    """

    value: Any
    where: str
    words: Any = None

    @property
    def text(self) -> Any:
        """The value of a setting that is text, or made of text."""
        return self.value if self.words is None else self.words


def shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"a {type(value).__name__} too long to show"


def validated(cls: Any, chosen: Mapping[str, Given]) -> Any:
    """A pydantic config of the values given. Raises ConfigError: all that are wrong, a line each."""
    from pydantic import ValidationError

    from spectune.errors import ConfigError

    try:
        return cls(**{key: _meant(given, cls.model_fields.get(key)) for key, given in chosen.items()})
    except ValidationError as error:
        lines = {}
        for problem in error.errors(include_url=False):
            place, reason = problem["loc"], problem["msg"].removeprefix("Value error, ")
            key = ".".join(map(str, place)) or error.title
            where = chosen[str(place[0])].where if place and place[0] in chosen else "settings"
            field = cls.model_fields.get(place[0]) if place else None
            if field is not None and (words := _words(field.annotation)):  # one line for all that it might be
                value = chosen[str(place[0])].value if place[0] in chosen else problem["input"]
                lines[place[0]] = f"{where}: {place[0]}: expected {words}, given {shown(value)}"
            else:
                lines[key] = f"{where}: {key}: {reason}" + (f", given {shown(problem['input'])}" if place else "")
        raise ConfigError("\n".join(lines.values())) from error


def _meant(given: Given, field: Any) -> Any:
    """A value as its setting has it: numbers are words where the setting takes no number."""
    return given.value if field is None or _NUMBERS & set(_leaves(field.annotation)) else given.text


#: what a setting may be for which a number is one
_NUMBERS = {bool, int, float, Any, object}


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types that a value is made of: of `dict[str, tuple[int, ...]]` str and int."""
    if get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
    elif parts := get_args(annotation):
        for part in parts:
            yield from _leaves(part)
    else:
        yield annotation


def _words(annotation: Any) -> str:
    """The values of a setting that has but a few, `true, false or auto`; empty where it takes others."""
    found = list(_values(annotation))
    if None in found:
        return ""
    words = [word for word in found if word is not None]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}" if words else ""


def _values(annotation: Any) -> Iterator[str | None]:
    """The words of an annotation's values, None for a part that takes any."""
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _values(part)
    elif annotation is type(None):
        yield "null"
    else:
        yield None
