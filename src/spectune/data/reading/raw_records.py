"""A record as a reader gives it: plain Python values with the place they came from, or what could not be read."""

import datetime
from collections.abc import Mapping
from typing import Any

#: one of these makes an object a row
SHAPES = ("prompt", "completion", "instruction", "output", "text", "messages", "conversations", "tokens")
#: what is a list or an object in a row, and so has to be written as JSON in a CSV's cell
AS_JSON = (
    "references", "choices", "messages", "conversations", "tools", "documents", "chat_template_kwargs", "history",
)  # fmt: skip
#: every name that means something in a row
NAMES = tuple(dict.fromkeys((*SHAPES, *AS_JSON, "input", "system", "label", "tags")))
#: names of parts of a data set, of which only one can be meant
SPLITS = (
    "train", "training", "valid", "validation", "val", "dev", "eval", "evaluation", "test", "holdout", "held_out",
    "held-out",
)  # fmt: skip
#: what is nested more deeply is left as it is: no row has it, and following it would end in Python's recursion limit
_DEEPEST = 110
_SCALARS = frozenset({str, int, float, bool, type(None)})
#: pandas' marks of an absent value that are no floats
_ABSENT = frozenset({"NAType", "NaTType"})


class Bad(str):
    """What is wrong with a record that could not be read at all."""

    __slots__ = ()


Record = tuple[str, Mapping[str, Any] | Bad]


class Doubled(dict[str, Any]):
    """An object of a JSON text in which a key stands twice."""

    def __init__(self, pairs: list[tuple[str, Any]], key: str) -> None:
        super().__init__(pairs)
        self.key = key


class _DoubledError(Exception):
    pass


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=...)`: the object, which tells where a key stands twice."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    return Doubled(pairs, next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]


def as_record(found: Any) -> Mapping[str, Any] | Bad:
    """What was read, as plain Python values. A null inside it is an absent key, as Parquet and `datasets` fill what an
    object lacks with it; a null of the record's own stays, so that it can be named."""
    if not isinstance(found, Mapping):
        return Bad(f"a {type(found).__name__}, expected an object with keys")
    try:
        if isinstance(found, Doubled):
            raise _DoubledError(found.key)
        return {key: plain(value) for key, value in found.items()}
    except _DoubledError as error:
        return Bad(f"the key {str(error)!r} stands twice in one object; expected each key once")


def plain(value: Any, depth: int = 1) -> Any:
    """Lists, dicts and Python's own scalars for whatever a library gives; a null in an object is an absent key."""
    if type(value) in _SCALARS or depth > _DEEPEST:
        return value
    if isinstance(value, Doubled):
        raise _DoubledError(value.key)
    if isinstance(value, Mapping):
        parts = ((key, plain(part, depth + 1)) for key, part in value.items())
        return {key: part for key, part in parts if part is not None}
    if isinstance(value, list | tuple):  # a null keeps its place here: positions mean something
        return [plain(part, depth + 1) for part in value]
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # of numpy, or a tensor
        return plain(value.tolist(), depth + 1)
    if isinstance(value, str):
        return str(value)
    if type(value).__name__ in _ABSENT:
        return None
    if isinstance(value, datetime.datetime) and hasattr(value, "to_pydatetime"):
        return value.to_pydatetime(warn=False)
    if isinstance(value, datetime.timedelta) and hasattr(value, "to_pytimedelta"):
        return value.to_pytimedelta()
    return value
