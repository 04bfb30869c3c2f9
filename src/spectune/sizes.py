"""Sizes of memory and files, and durations, as people write them."""

import re

from spectune.errors import ConfigError

_FACTORS = {"": 1} | {
    f"{prefix}{kind}": base ** (power + 1)
    for kind, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("kmgt")
}


def bytes_of(size: int | str, what: str = "memory") -> int:
    """Bytes of `24GiB` (binary), `24GB` or `24G` (decimal), `800 MiB` or a plain number.

    Args:
        what: the setting or flag, for the message.

    Raises:
        ConfigError: it is no size above zero.
    """
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", size, re.IGNORECASE)
    value = int(float(found[1]) * _FACTORS.get(found[2].lower(), 0)) if found is not None else 0
    if not value:
        raise ConfigError(f"{what} {size}: expected a size above zero, such as 24GiB, 2GB or 500MB")
    return value


def duration(seconds: float) -> str:
    """35 s, 4 min, 2 h 10 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
