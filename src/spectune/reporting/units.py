"""Numbers as people read them."""

import math

MISSING = "-"


def count(value: float | None) -> str:
    """1,234 -> 1.2k, 4,975,264 -> 5.0M."""
    return _scaled(value, ("B", "M", "k", ""))


def size(value: float | None) -> str:
    """Bytes in decimal units: 12.3 MB."""
    return _scaled(value, (" GB", " MB", " kB", " B"))


def _scaled(value: float | None, units: tuple[str, str, str, str]) -> str:
    if value is None:
        return MISSING
    for scale, unit in zip((1e9, 1e6, 1e3), units, strict=False):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}" if value < 100 * scale else f"{value / scale:.0f}{unit}"
    return f"{value:.0f}{units[-1]}"


def percent(value: float | None, *, sign: bool = False) -> str:
    """A share as per cent, three digits: 0.0371 -> 3.71%."""
    if value is None:
        return MISSING
    if sign:
        return f"{100 * value:+.0f}%"
    return "100%" if 100 * value == 100 else f"{100 * value:.3g}%"


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
