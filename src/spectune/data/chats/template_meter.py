"""How much a chat template may do: steps, and memory for what it makes, counted while it is rendered.

Each number has a share that any conversation gets, and a share that grows with the conversation: what is long may take
long. The second is worked out only where the first is used up.
"""

import datetime
import decimal
import sys
import uuid
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

#: steps (loop rounds and calls, weighed with what stands in the loop or macro) and bytes that any rendering may take
STEPS, ROOM = 50_000, 48 << 20
#: the largest thing that may be made
LARGEST = 256 << 10
#: what a long conversation adds at most
_MOST_STEPS, _MOST_ROOM = 20_000_000, 512 << 20
#: lists in lists that a template may build
_DEEPEST = 120
#: texts shorter than this are too small to be counted one by one: how many there are is limited by the steps
SMALL = 256
_NODE = 64
_NEEDED = "than any conversation of this length needs"
SCALARS = frozenset({bool, int, float, type(None)})
CONTAINERS = frozenset({list, tuple, dict})
_MORE_SCALARS = (
    datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID, bytes, complex, range,
)  # fmt: skip


class TemplateLimitError(BaseException):
    """What a template does that no template may. Not an `Exception`: nothing within jinja takes it for one of its
    own."""


class _Weighed(NamedTuple):
    value: Any  # kept, so that no other object gets its id
    weight: int
    depth: int
    odd: str | None


class Meter:
    """What one rendering has left.

    Args:
        given: what the template is given: messages, tools, documents, arguments.
    """

    # of the class until they change: there is one for each rendering
    steps, room, largest = STEPS, ROOM, LARGEST
    _granted = False
    _known: dict[int, _Weighed] | None = None

    def __init__(self, given: Collection[Any]) -> None:
        self._given = given

    def step(self, count: int) -> None:
        """Raises TemplateLimitError: more steps than a conversation of this length needs."""
        self.steps -= count
        if self.steps < 0 and not (self._grant() and self.steps >= 0):
            raise TemplateLimitError(
                "goes through more rounds of loops and calls than any conversation of this length needs"
            )

    def take(self, size: int) -> None:
        """Account for `size` bytes. Raises TemplateLimitError: it is too much, at once or in all."""
        self.fits(size)
        self.room -= size
        if self.room < 0 and not (self._grant() and self.room >= 0):
            raise TemplateLimitError(f"makes more text {_NEEDED}")

    def fits(self, size: int) -> None:
        """Raises TemplateLimitError: nothing of so many bytes may be made."""
        if size > self.largest and not (self._grant() and size <= self.largest):
            raise TemplateLimitError(f"makes a text or a list of more than {self.largest >> 10:,} KiB at once")

    def _grant(self) -> bool:
        """What the conversation's own length adds, once."""
        if self._granted:
            return False
        self._granted = True
        self.largest = sys.maxsize  # what is given is as large as it is
        weight = sum(self.weigh(part) for part in self._given)
        messages = sum(len(part) for part in self._given if isinstance(part, list | tuple | dict))
        self.largest = LARGEST + 4 * weight
        self.steps += min(1000 * messages + 4 * messages**2 + 2 * weight, _MOST_STEPS)
        self.room += min(200 * weight, _MOST_ROOM + 8 * weight)
        return True

    def weigh(self, value: Any, depth: int = 0) -> int:
        """About how many bytes a value is as text, everything in it written out as often as it stands there.

        Raises TemplateLimitError: more than may be made, or nested too deeply."""
        return self._weigh(value, depth).weight

    def odd(self, value: Any) -> str | None:
        """The type of something in a container whose text is its address in memory."""
        return self._weigh(value, 0).odd

    def indented(self, value: Any) -> int:
        """About how many lines a value has as indented JSON, times how deep it is."""
        found = self._weigh(value, 0)
        return found.weight // 16 * (found.depth + 1)

    def _weigh(self, value: Any, depth: int) -> _Weighed:
        kind = type(value)
        if kind is str:
            return _Weighed(value, len(value) + _NODE, 0, None)
        if kind in SCALARS:
            return _SCALAR
        if kind not in CONTAINERS:
            if isinstance(value, str | bytes):
                return _Weighed(value, len(value) + _NODE, 0, None)
            if not isinstance(value, list | tuple | Mapping):
                return _SCALAR if is_plain(value) else _Weighed(value, _NODE, 0, kind.__name__)
        if self._known is None:
            self._known = {}
        if (known := self._known.get(id(value))) is not None:
            return known
        if depth > _DEEPEST:
            raise TemplateLimitError(f"nests lists more than {_DEEPEST} levels deep")
        weight, deepest, odd = _NODE, 0, None
        parts: Iterable[Any] = value
        if isinstance(value, Mapping):
            parts = (part for pair in value.items() for part in pair)
        for part in parts:
            if type(part) is str:
                weight += len(part) + _NODE
                continue
            found = self._weigh(part, depth + 1)
            weight += found.weight
            deepest = found.depth if found.depth > deepest else deepest
            odd = odd or found.odd
            if weight > self.largest:
                break
        self.fits(weight)
        if deepest > _DEEPEST:
            raise TemplateLimitError(f"nests lists more than {_DEEPEST} levels deep")
        self._known[id(value)] = made = _Weighed(value, weight, deepest + 1, odd)
        return made


_SCALAR = _Weighed(None, _NODE, 0, None)


def is_plain(value: Any) -> bool:
    """Whether a value's text says what it holds, and not where in memory it is."""
    return isinstance(value, _MORE_SCALARS) or type(value) in SCALARS or " at 0x" not in str(value)


def odd(kind: str) -> str:
    """What to say of a value of this type that is written."""
    return f"writes the address of an object in memory (a {kind}), which is another one each time"
