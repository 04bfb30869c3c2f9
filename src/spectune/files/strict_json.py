"""JSON that every reader takes: the standard has no word for NaN and infinity."""

import json
import math
from typing import Any


def finite(value: Any) -> Any:
    """A copy of nested dicts and lists in which numbers that are not finite are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def strict_json(value: Any, indent: int | None = 2) -> str:
    """`value` as JSON text; numbers that are not finite become null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)
