"""Versions of what we stand on with faults that are known, and what spectune does about them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spectune.health.outcome import FAILED, OK, Outcome
from spectune.version import installed_version

#: the oldest that are tested (pyproject.toml)
FLOORS = {"torch": (2, 11), "transformers": (5, 17)}


@dataclass(frozen=True)
class KnownFault:
    """A fault of some versions of a package: from `first` up to, and not with, `fixed`; None is none known.

    Attributes:
        what: the fault, and what follows for a user.
        source: where it was found.
        avoided: spectune itself goes around it.
        needs: packages of which one has to be there too; none by default.
    """

    package: str
    first: tuple[int, ...] | None
    fixed: tuple[int, ...] | None
    what: str
    source: str
    avoided: bool = True
    needs: tuple[str, ...] = ()

    def has(self, version: tuple[int, ...]) -> bool:
        return (self.first is None or version >= self.first) and (self.fixed is None or version < self.fixed)


KNOWN = (
    KnownFault(
        "torch", (2, 11), (2, 13),
        "a compiled autograd.Function whose forward ends in place, or with a cast to the dtype it has, gets zeros for "
        "its gradient",
        "docs/decisions.md, 2026-11-27: found with 2.11, not with 2.13",
    ),
    KnownFault(
        "torch", (2, 11), None,
        "cuDNN's attention with a mask gives gradients that are not finite on Hopper, where a query sees nothing "
        "(loops of your own: torch.backends.cuda.enable_cudnn_sdp(False))",
        "docs/results/kernels.md: found with 2.11 and cuDNN 9.19 on an H200; later versions were not looked at there",
        needs=("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    ),
)  # fmt: skip


def versions(installed: Mapping[str, str | None] | None = None, known: tuple[KnownFault, ...] = KNOWN) -> Outcome:
    """Installed versions against the floors and the table."""
    names = {*FLOORS, *(name for fault in known for name in (fault.package, *fault.needs))}
    found = {name: installed_version(name) for name in names} if installed is None else dict(installed)
    numbers = {name: parsed(version) for name, version in found.items() if version is not None}
    low = [
        f"{name} {found[name] or 'is not installed'}{'' if found[name] is None else f' is older than {dotted(floor)}'}"
        for name, floor in FLOORS.items()
        if numbers.get(name, ()) < floor
    ]
    if low:
        wanted = " ".join(f"'{name}>={dotted(floor)}'" for name, floor in FLOORS.items())
        return Outcome("versions", FAILED, ", ".join(low), f"pip install --upgrade {wanted}")
    here = [
        fault for fault in known
        if fault.package in numbers and fault.has(numbers[fault.package])
        and (not fault.needs or any(name in numbers for name in fault.needs))
    ]  # fmt: skip
    said = ", ".join(f"{name} {found[name]}" for name in sorted(numbers))
    open_faults = [fault for fault in here if not fault.avoided]
    if open_faults:
        what = "; ".join(f"{fault.package}: {fault.what} ({fault.source})" for fault in open_faults)
        return Outcome("versions", FAILED, f"{said}: {what}", "Install another version of it")
    avoided = "; ".join(f"{fault.package}: {fault.what}" for fault in here)
    return Outcome("versions", OK, f"{said}{f'. Known faults, avoided by spectune: {avoided}' if avoided else ''}")


def parsed(version: str) -> tuple[int, ...]:
    """`2.11.0+cu128` as (2, 11, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
