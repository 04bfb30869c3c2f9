"""`spectune doctor`: what of our fast paths works on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectune.cli import console, options
from spectune.errors import ConfigError, did_you_mean, first_line

if TYPE_CHECKING:
    from spectune.health.outcome import Outcome

#: all checks are over by then
SECONDS = 55.0
#: those that look at this process and its machine, and need no other process
OWN = ("versions", "cores", "quiet", "memory")


def doctor(
    output_dir: Annotated[Path, typer.Option(help="Where runs will be written.")] = Path("runs"),
    skip: Annotated[
        list[str] | None, typer.Option(help="A check to leave out, such as compile. Repeatable.", show_default="none")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check what of the fast paths works on this machine, in under a minute.

    Attention kernels, torch.compile, CUDA graphs, products in fp8, int8 and nf4, sums between processes or GPUs, disks,
    memory, cores, and versions with known faults. One line a check: ok; not here (why, and what that costs); FAILED
    (and what to do). Exits with 1 if any failed, else with 0.

    \b
    Examples:
      spectune doctor
      spectune doctor --output-dir /data/runs --json
      spectune doctor --skip compile
    """
    outcomes, began = [], time.monotonic()
    for outcome in found_by(output_dir, skip or []):
        outcomes.append(outcome)
        if not as_json:
            console.answer(outcome.line())
    failed = [outcome.name for outcome in outcomes if outcome.status == "failed"]
    seconds = time.monotonic() - began
    answer = {"ok": not failed, "seconds": seconds, "checks": [outcome.to_dict() for outcome in outcomes]}
    if not as_json:
        found = f"{len(failed)} failed: {', '.join(failed)}" if failed else "nothing failed"
        console.answer(f"{found}, {seconds:.0f} s")
    console.print_answer(answer, as_json=as_json)
    if failed:
        raise typer.Exit(1)


def found_by(output: Path, skip: list[str]) -> Iterator[Outcome]:
    """The outcome of each check, as it comes. Raises ConfigError: a name that is no check's."""
    from spectune.health import known_faults, machine_load
    from spectune.health.checkup import Checkup, checks

    cache = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    others = checks(str(output), cache)
    _check_names(skip, [*OWN, *(check.name for check in others)])
    # before anything of ours computes
    looks: dict[str, Callable[[], Outcome]] = {
        "versions": known_faults.versions, "cores": machine_load.cores, "quiet": machine_load.busy,
    }  # fmt: skip
    yield from (_looked(name, look) for name, look in looks.items() if name not in skip)
    wanted = [check for check in others if check.name not in skip]
    with Checkup(SECONDS).started(wanted) as outcomes:
        if "memory" not in skip:
            yield _looked("memory", _memory)
        yield from outcomes


def _check_names(skip: list[str], known: list[str]) -> None:
    for name in skip:
        if name not in known:
            raise ConfigError(f"--skip {name}: no such check{did_you_mean(name, known)}; they are {', '.join(known)}")


def _looked(name: str, look: Callable[[], Outcome]) -> Outcome:
    """What a check in this process found. It may raise whatever is broken: torch itself, or the system's own files."""
    from spectune.health.outcome import FAILED, Outcome

    began = time.monotonic()
    try:
        found = look()
    except Exception as error:
        found = Outcome(
            name, FAILED, f"{type(error).__name__}: {first_line(error)}", "Mend what it names, or install it anew"
        )
    return replace(found, seconds=time.monotonic() - began)


def _memory() -> Outcome:
    from spectune.health.machine_load import memory
    from spectune.planning.device_memory import free_memory

    return memory(free_memory("cpu"))
