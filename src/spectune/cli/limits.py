"""The limits that a recommendation has to keep, as flags."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from spectune.errors import ConfigError

if TYPE_CHECKING:
    from spectune.comparing.recommend import Limits

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{kind}": base ** (power + 1)
    for kind, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT")
}
#: `24G` is said for gibibytes of memory
UNITS |= {prefix: 1024 ** (power + 1) for power, prefix in enumerate("KMGT")}

MaxMemory = Annotated[str | None, typer.Option(help="The most memory that training may take, such as 24GiB.")]
MaxLatencyOverhead = Annotated[
    str | None, typer.Option(help="The most extra time a decoded token may take against the bare base: 0.1 or 10%.")
]
Tenants = Annotated[int | None, typer.Option(min=1, help="Tasks that one base serves at a time.", show_default="1")]
MaxStoredBytes = Annotated[str | None, typer.Option(help="The most bytes on disk of all tenants' weights: 2GB.")]
MinQuality = Annotated[
    float | None,
    typer.Option(help="The least relative performance: 0 is the bare base, 100 is full fine-tuning."),
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
    from spectune.comparing.recommend import Limits

    return Limits(
        max_memory_bytes=None if max_memory is None else size(max_memory, "--max-memory"),
        max_latency_overhead=None if max_latency_overhead is None else _share(max_latency_overhead),
        tenants=tenants or 1,
        max_stored_bytes=None if max_stored_bytes is None else size(max_stored_bytes, "--max-stored-bytes"),
        min_quality=min_quality,
    )


def size(text: str, flag: str) -> int:
    """Bytes: 24GiB, 24G (the same), 2GB, 500 MB, 1000000.

    Raises:
        ConfigError: it is no size; names the flag.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ConfigError(f"{flag} {text}: expected a size such as 24GiB, 2GB or 500MB")
    return round(float(found[1]) * units[found[2].lower()])


def _share(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigError(f"--max-latency-overhead {text}: expected a share such as 0.1 or 10%") from None
