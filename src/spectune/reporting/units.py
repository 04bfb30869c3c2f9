"""Numbers as people read them."""

from __future__ import annotations

import math

MISSING = "-"


def count(value: float | None) -> str:
    """1,234 -> 1.2k, 4,975,264 -> 5.0M."""
    if value is None:
        return MISSING
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if value < 100 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def size(value: float | None) -> str:
    """Bytes in decimal units: 12.3 MB."""
    if value is None:
        return MISSING
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 100 * scale else f"{value / scale:.0f} {unit}"
    return f"{value:.0f} B"


def percent(value: float | None, *, sign: bool = False) -> str:
    """A share as per cent, three digits: 0.0371 -> 3.71%."""
    if value is None:
        return MISSING
    hundred = 100 * value
    if sign:
        return f"{hundred:+.0f}%"
    return "100%" if hundred == 100 else f"{hundred:.3g}%"


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return MISSING
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def seconds(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"
