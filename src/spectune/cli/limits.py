"""The limits that a recommendation has to keep, as flags."""

import math
import re
from typing import Annotated, Any

import typer

from spectune.errors import ConfigError
from spectune.sizes import bytes_of

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
    typer.Option(
        help="Minimum relative performance: 0 is the bare base, 100 is full fine-tuning, or the best method where full "
        "fine-tuning was not run or is no better than the base."
    ),
]


#: the parameters of a command that are limits
FLAGS = ("max_memory", "max_latency_overhead", "tenants", "max_stored_bytes", "min_quality")


def fields(context: typer.Context) -> dict[str, Any]:
    """The limits among a command's flags, by the names of `spectune.results.Limits`. Raises ConfigError: a size or a
    share that cannot be read."""
    memory, overhead, tenants, stored, quality = (context.params[flag] for flag in FLAGS)
    if quality is not None and not math.isfinite(quality):
        raise ConfigError(f"--min-quality {quality}: expected a number, such as 95")
    found = {
        "max_memory_bytes": None if memory is None else bytes_of(memory, "--max-memory"),
        "max_latency_overhead": None if overhead is None else share(overhead),
        "tenants": tenants,
        "max_stored_bytes": None if stored is None else bytes_of(stored, "--max-stored-bytes"),
        "min_quality": quality,
    }
    return {name: value for name, value in found.items() if value is not None}


def share(text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*", text)
    if found is None:
        raise ConfigError(f"--max-latency-overhead {text}: expected a share such as 0.1, or 10%")
    return float(found[1]) / (100 if found[2] else 1)
