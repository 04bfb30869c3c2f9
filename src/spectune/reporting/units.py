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


def with_interval(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """A value and half the width of its interval: 0.319 ±0.012; the value alone where there is no interval."""
    if value is None or low is None or high is None or not math.isfinite(high - low):
        return number(value, digits)
    return f"{number(value, digits)} ±{(high - low) / 2:.{digits}f}"


def rate(value: float | None) -> str:
    """A learning rate: 0.0003, 3e-05."""
    return MISSING if value is None else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """12 ms, 4.2 s, 3 min 20 s, 2 h 05 min."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value < 120:
        return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
