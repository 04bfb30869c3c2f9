"""What an operation of a chat template can make at most, before it makes it: methods of text, filters, operators."""

import re
from collections.abc import Collection, Iterable, Sequence, Sized
from contextvars import ContextVar
from typing import Any

from jinja2.runtime import Undefined
from markupsafe import Markup

from spectune.data.chats.template_meter import CONTAINERS, SCALARS, SMALL, Meter, TemplateLimitError, odd

#: no width, count or precision is larger
_WIDEST = 1_000_000
#: binary digits of a whole number
_BITS = 20_000
#: characters that filters which search a text again and again may get
_SLOW_LENGTH = 100_000
#: an item of a list of short texts takes so many bytes
_ITEM = 64
_WIDTHS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes", "hex", "format", "split", "rsplit"})
#: methods that make much of a short text
_GROWING = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "replace", "join", "translate", "maketrans", "encode"}
)
#: of these, what is made is at most so many times as large as the text
_FACTORS = {
    **dict.fromkeys(("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "partition", "rpartition"), 1),
    **dict.fromkeys(("startswith", "endswith", "find", "rfind", "index", "rindex", "count"), 0),
    **dict.fromkeys(("isalpha", "isalnum", "isdigit", "isnumeric", "isdecimal", "isspace", "isupper", "islower"), 0),
    **dict.fromkeys(("upper", "lower", "title", "capitalize", "swapcase", "casefold"), 3),
}
#: filters whose value may be anything, and that do not walk through it
_UNREAD = frozenset({"length", "count", "default", "d", "first", "attr", "abs", "safe", "items"})
_LINEAR = {
    **dict.fromkeys(("trim", "string", "last", "reverse"), 2), **dict.fromkeys(("upper", "lower", "capitalize"), 3),
    **dict.fromkeys(("escape", "e", "forceescape"), 6), "tojson": 12, "list": 84, "urlencode": 12, "indent": 1,
    "replace": 1, "center": 1, "join": 1, "format": 1, "truncate": 1, "float": 0, "int": 0,
}  # fmt: skip
_SLOW = frozenset({"urlize", "striptags", "wordwrap", "pprint", "xmlattr", "filesizeformat"})
_AS_TEXT = frozenset(
    {"string", "tojson", "trim", "upper", "lower", "capitalize", "title", "replace", "indent", "center", "truncate",
     "format", "escape", "e", "forceescape", "urlencode", "wordcount", *_SLOW}
)  # fmt: skip
_CONVERSION = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+)?)?")


def widths(name: str, given: Iterable[Any]) -> None:
    """Raises TemplateLimitError: a width is too large."""
    if name in _WIDTHS and any(isinstance(number, int) and abs(number) > _WIDEST for number in given):
        raise TemplateLimitError(f"asks {name} for more than {_WIDEST:,} characters")


def check_method(
    variable: ContextVar[Meter], text: str, name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Raises TemplateLimitError: a text's method would make too much."""
    size = len(text)
    if size < SMALL and name not in _GROWING:
        return
    meter = variable.get()
    widths(name, (*args, *kwargs.values()))
    if name in ("split", "rsplit", "splitlines"):
        separator = args[0] if args else kwargs.get("sep")
        by = text.count(separator) if isinstance(separator, str) and separator else size // 2
        meter.fits(text.__sizeof__() + _ITEM * (by + 1))
    elif name == "replace":
        meter.fits(_replaced(text, *args[:2]) if len(args) >= 2 else size)
    elif name == "join":
        meter.fits(_joined(meter, text, args))
    elif name in _GROWING:
        numbers = sum(abs(number) for number in (*args, *kwargs.values()) if isinstance(number, int))
        rest = sum(meter.weigh(part) for part in (*args, *kwargs.values()) if not isinstance(part, int))
        tabs = text.count("\t") if name == "expandtabs" else 1
        meter.fits(size + tabs * max(numbers, 8))
        if name in ("translate", "maketrans", "encode"):
            meter.fits(100 * size + size * rest)
    else:
        meter.fits(_FACTORS.get(name, 100) * size)


def _replaced(text: str, old: Any, new: Any) -> int:
    if not isinstance(old, str) or not isinstance(new, str):
        return len(text)
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _joined(meter: Meter, separator: str, args: Sequence[Any]) -> int:
    if not args or type(args[0]) not in CONTAINERS:
        if args and not isinstance(args[0], str):
            raise TemplateLimitError("joins what is neither a list nor a text")
        return len(args[0]) * (len(separator) + 1) if args else 0
    meter.step(len(args[0]) // 8)
    return len(separator) * len(args[0]) + meter.weigh(args[0])


def check_operator(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """Raises TemplateLimitError: what `*`, `**` or `%` gives is too large."""
    if operator == "%":
        if isinstance(left, bytes | bytearray):
            raise TemplateLimitError("formats bytes")
        if isinstance(left, str):
            meter.fits(_formatted(meter, left, right))
        return
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "**":
        if numbers and right > 0 and left.bit_length() * right > _BITS:
            raise TemplateLimitError(f"works out a number of more than {_BITS:,} binary digits")
    elif numbers:
        if left.bit_length() + right.bit_length() > _BITS:
            raise TemplateLimitError(f"works out a number of more than {_BITS:,} binary digits")
    else:
        for repeated, count in ((left, right), (right, left)):
            if isinstance(count, int) and isinstance(repeated, Sized):
                meter.fits(count * (len(repeated) if isinstance(repeated, str | bytes) else meter.weigh(repeated)))


def _formatted(meter: Meter, form: str, given: Any) -> int:
    """What `form % given` has at most."""
    conversions = _CONVERSION.findall(form) if "%" in form else []
    values = given if isinstance(given, tuple) else (given,)
    longest = max((meter.weigh(value) for value in values), default=0)
    total = len(form)
    for pair in conversions:
        for number in pair:
            if number == "*":
                widths("format", values)
                total += max((abs(value) for value in values if isinstance(value, int)), default=0)
            elif number:
                widths("format", [int(number[:12])])
                total += int(number[:12])
    meter.step(len(conversions))
    return total + len(conversions) * longest


class _FilterCheck:
    """Looks at a filter's value and arguments before it is called."""

    #: filters that make much of a short text
    grows = frozenset(
        {"center", "indent", "replace", "format", "batch", "slice", "join", "truncate", "wordwrap", "round", "sum",
         "tojson", "map", "urlize", "xmlattr"}
    )  # fmt: skip

    def __call__(self, meter: Meter, name: str, value: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The value, as the filter is to get it. Raises TemplateLimitError: what it would make is too much."""
        if name in _UNREAD or (not args and not kwargs and (name == "tojson" or type(value) in SCALARS)):
            return value  # what is in it was looked at where it was made
        given = (*args, *kwargs.values())
        if any(isinstance(number, int) and abs(number) > _WIDEST for number in given) and name not in ("map", "select"):
            raise TemplateLimitError(f"gives the filter {name} a number above {_WIDEST:,}")
        if isinstance(value, Undefined):
            return value
        if name in _AS_TEXT and not isinstance(value, str) and (found := meter.odd(value)) is not None:
            raise TemplateLimitError(odd(found))
        size = self._size(meter, name, value)
        if name in _SLOW and size > _SLOW_LENGTH:
            raise TemplateLimitError(f"gives the filter {name} more than {_SLOW_LENGTH:,} characters")
        if name in _AS_TEXT or isinstance(value, str):
            meter.fits(_LINEAR.get(name, 100) * size)
        getattr(self, f"_{name}", self._other)(meter, value, size, given)
        return value

    def _size(self, meter: Meter, name: str, value: Any) -> int:
        """Of a value as text, or of a list how many items it has."""
        if isinstance(value, str | bytes):
            return len(value)
        if name in _AS_TEXT:
            return meter.weigh(value)
        if isinstance(value, Sized):
            meter.step(len(value) // 8)
            return len(value)
        return 0

    def _other(self, meter: Meter, value: Any, size: int, given: Collection[Any]) -> None:
        """Of most filters, what they get says what they make."""

    def _widened(self, meter: Meter, value: Any, size: int, given: Collection[Any]) -> None:
        lines = 2 + (value.count("\n") + value.count("\r") if isinstance(value, str) else size)
        width = max((len(w) if isinstance(w, str) else abs(w) if isinstance(w, int) else 0 for w in given), default=4)
        meter.fits(size + lines * width)

    _indent = _center = _truncate = _widened

    def _wordwrap(self, meter: Meter, value: Any, size: int, given: Collection[Any]) -> None:
        meter.fits(size * (2 + sum(len(text) for text in given if isinstance(text, str))))

    def _urlize(self, meter: Meter, value: Any, size: int, given: Collection[Any]) -> None:
        meter.fits(size * (100 + sum(len(text) for text in given if isinstance(text, str))))

    def _replace(self, meter: Meter, value: Any, size: int, given: Collection[Any]) -> None:
        texts = [str(text) for text in given if isinstance(text, str | int | float)]
        if len(texts) >= 2:
            text = value if isinstance(value, str) else ""
            most = (text.count(texts[0]) if texts[0] and text else size + 1) * len(texts[1])
            meter.fits((size + most) * (6 if isinstance(value, Markup) else 1))

    def _format(self, meter: Meter, value: Any, size: int, given: Collection[Any]) -> None:
        if isinstance(value, str):
            meter.fits(_formatted(meter, value, tuple(given)))

    def _batch(self, meter: Meter, value: Any, size: int, given: Collection[Any]) -> None:
        meter.take(16 * max((number for number in given if isinstance(number, int)), default=0))

    _slice = _batch

    def _sum(self, meter: Meter, value: Any, size: int, given: Collection[Any]) -> None:
        if any(isinstance(start, Sized) and not isinstance(start, str) for start in given):
            raise TemplateLimitError("adds up lists with the filter sum")

    def _tojson(self, meter: Meter, value: Any, size: int, given: Collection[Any]) -> None:
        width = max((len(w) if isinstance(w, str) else int(w) for w in given if isinstance(w, str | int)), default=0)
        width += sum(len(part) for pair in given if isinstance(pair, tuple) for part in pair if isinstance(part, str))
        if width > 1:
            meter.fits(12 * size + width * meter.indented(value))


check_filter = _FilterCheck()
