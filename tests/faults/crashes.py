"""Kills: before each call that writes, inside a write, at any time, and with the power gone, too. The same command with
`--resume` then ends as if nothing had been."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence

from tests.faults.child import Outcome
from tests.faults.kinds import Kind, Place, Verdict
from tests.faults.material import COMPARE, OUT, calls, case, compared, either, resumed, trained, tree, unbroken

CASES = {"train": 350, "compare": 150}


def point(place: Place, names: Sequence[str], share: float) -> tuple[str, int]:
    """A scenario and one of its calls, so far into all calls of all these scenarios."""
    left = int(share * sum(len(calls(place, name)) for name in names))
    for name in names:
        if left < len(calls(place, name)):
            return name, left
        left -= len(calls(place, name))
    raise AssertionError(f"{share} is not below 1")


def after_kill(place: Place, outcome: Outcome) -> list[str]:
    """What must hold as soon as a run is killed."""
    problems = [f"before the kill: {outcome}"] if outcome.traceback else []
    links = [f"{name}: {kind}" for name, kind in tree(place.folder / OUT).items() if kind.endswith("nothing")]
    return problems + links


def _killed(place: Place, rng: random.Random, name: str, at: int, resuming: bool) -> tuple[str, list[str]]:
    call = calls(place, name)[at] if not resuming else ("", [], 0)
    within = rng.random() if rng.random() < 0.5 and (resuming or (call[0] == "write" and call[2] > 1)) else None
    fault = ("tests.faults.injection:kill", {"root": str(place.folder / OUT), "at": at, "within": within})
    outcome = place.forks.run(case(place, name, *(["--resume"] if resuming else []), faults=[fault]))
    what = f"killed {'in' if within is not None else 'before'} call {at}"
    what += " of its resumption" if resuming else f" ({call[0]} {' '.join(call[1])})"
    problems = after_kill(place, outcome)
    ended = outcome.rc == 0 and resuming  # it had fewer calls left
    if outcome.rc != -signal.SIGKILL and not ended:
        problems.append(f"{what}: {outcome}")
    return what, problems


def _crash_point(kind: str, scenarios: Callable[[Place], list[str]]) -> Kind:
    def run(place: Place, seed: int, index: int) -> Verdict:
        rng = made.random(seed, index)
        name, at = point(place, scenarios(place), (index % made.cases + rng.random()) / made.cases)
        what, problems = _killed(place, rng, name, at, resuming=False)
        if rng.random() < 1 / 3:
            again, more = _killed(place, rng, name, rng.randrange(len(calls(place, name))), resuming=True)
            what, problems = f"{what}, then {again}", problems + more
        return Verdict(f"{kind} {name} {what}", problems + resumed(place, name)[1])

    made = Kind(
        f"crash-{kind}",
        f"`{kind}` killed before or inside a call that writes, some again while going on: `--resume` ends bit-equal, "
        "with nothing left over and no link to nothing",
        CASES[kind], run, quick=12, fast=2 if kind == "train" else 1,
    )  # fmt: skip
    return made


def _random_kill(place: Place, seed: int, index: int) -> Verdict:
    rng = KILLS.random(seed, index)
    name = rng.choice([*trained(place), *either(place)])
    unbroken(place, name)
    seconds = rng.random() * (1.8 if name in COMPARE else 0.6)
    child = place.forks.start(case(place, name))
    time.sleep(seconds)
    child.signal(signal.SIGKILL)
    problems = after_kill(place, child.wait())
    return Verdict(f"{name} killed after {seconds:.3f} s", problems + resumed(place, name)[1])


KILLS = Kind(
    "random-kills", "`train` and `compare` killed at any time: as at a crash point", 100, _random_kill, quick=6, fast=0
)


def _power_cut(place: Place, seed: int, index: int) -> Verdict:
    rng = POWER.random(seed, index)
    name, at = point(place, either(place), (index % POWER.cases + rng.random()) / POWER.cases)
    fault = ("tests.faults.injection:cut_power", {"root": str(place.folder / OUT), "at": at, "seed": rng.random()})
    outcome = place.forks.run(case(place, name, faults=[fault]))
    call, paths, _ = calls(place, name)[at]
    return Verdict(
        f"{name}, power gone before call {at} ({call} {' '.join(paths)})",
        after_kill(place, outcome) + resumed(place, name)[1],
    )


POWER = Kind(
    "power-cuts",
    "the power goes before a call that writes, and what was not synced is lost (bytes of files, renames in folders): "
    "`--resume` ends bit-equal",
    100, _power_cut, quick=6, fast=1,
)  # fmt: skip

KINDS = (_crash_point("train", trained), _crash_point("compare", compared), KILLS, POWER)
