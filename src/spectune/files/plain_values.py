"""What JSON and YAML may hold, whoever wrote them: a bounded depth, text that can be written, integers that fit."""

from typing import Any

#: lists in lists; ours have less than ten
MAX_DEPTH = 64
#: the least and the most that an integer may be
_LEAST, _MOST = -(2**63), 2**64 - 1


def check_plain(value: Any) -> None:
    """Raise ValueError where a value is deeper than `MAX_DEPTH`, or has text that cannot be written as UTF-8."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str):
            _check_text(item)
            continue
        if not isinstance(item, dict | list):
            continue
        if depth >= MAX_DEPTH:
            raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep")
        if isinstance(item, dict):
            for key in item:
                _check_text(key)
        waiting += [(inner, depth + 1) for inner in (item.values() if isinstance(item, dict) else item)]


def whole_number(text: str, base: int = 10) -> int:
    """The integer that digits stand for. Raises ValueError: none that fits into 64 bits, which no field here needs."""
    value = int(text, base) if len(text) <= 80 else None
    if value is None or not _LEAST <= value <= _MOST:
        raise ValueError(f"the integer {text[:20]}... is too large")
    return value


def is_text(text: str) -> bool:
    """Whether it can be written: half of a surrogate pair, which JSON and YAML may name, cannot."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_text(text: str) -> None:
    if not is_text(text):
        raise ValueError("half of a surrogate pair, an unfinished hex escape")
