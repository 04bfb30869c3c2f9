"""The limits that a recommendation has to keep, as flags."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.errors import ConfigError
from spectune.sizes import bytes_of

if TYPE_CHECKING:
    from spectune.comparing.advising.limits import Limits

MaxMemory = Annotated[str | None, typer.Option(help="Limit on training memory, such as 24GiB.")]
MaxLatencyOverhead = Annotated[
    str | None, typer.Option(help="Limit on extra decoding time per token, relative to the bare base: 0.1 or 10%.")
]
Tenants = Annotated[
    int | None, typer.Option(min=1, help="Tasks that one base serves at the same time.", show_default="1")
]
MaxStoredBytes = Annotated[str | None, typer.Option(help="Limit on disk space for all tenants' weights, such as 2GB.")]
MinQuality = Annotated[
    float | None,
    typer.Option(help="Minimum relative performance: 0 is the bare base, 100 is full fine-tuning."),
]


def given(
    max_memory: str | None,
    max_latency_overhead: str | None,
    tenants: int | None,
    max_stored_bytes: str | None,
    min_quality: float | None,
) -> Limits:
    """The flags as limits.

    Raises:
        ConfigError: a size or a share that cannot be read.
    """
    from spectune.comparing.advising.limits import Limits

    return Limits(**fields(max_memory, max_latency_overhead, tenants, max_stored_bytes, min_quality))


def fields(
    max_memory: str | None,
    max_latency_overhead: str | None,
    tenants: int | None,
    max_stored_bytes: str | None,
    min_quality: float | None,
) -> dict[str, Any]:
    """The limits that were given, by the names of `spectune.comparing.advising.limits.Limits`.

    Raises:
        ConfigError: a size or a share that cannot be read.
    """
    if min_quality is not None and not math.isfinite(min_quality):
        raise ConfigError(f"--min-quality {min_quality}: expected a number, such as 95")
    found = {
        "max_memory_bytes": None if max_memory is None else bytes_of(max_memory, "--max-memory"),
        "max_latency_overhead": None if max_latency_overhead is None else share(max_latency_overhead),
        "tenants": tenants,
        "max_stored_bytes": None if max_stored_bytes is None else bytes_of(max_stored_bytes, "--max-stored-bytes"),
        "min_quality": min_quality,
    }
    return {name: value for name, value in found.items() if value is not None}


def share(text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*", text)
    if found is None:
        raise ConfigError(f"--max-latency-overhead {text}: expected a share such as 0.1, or 10%")
    return float(found[1]) / (100 if found[2] else 1)
