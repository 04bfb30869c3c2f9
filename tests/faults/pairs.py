"""Two processes at once on one folder: one wins, the other is refused by name, and nothing is lost."""

from __future__ import annotations

import random
import time
from dataclasses import replace

from tests.faults.child import Case, Outcome
from tests.faults.disks import DERIVED, derived, made
from tests.faults.kinds import Kind, Place, Verdict
from tests.faults.material import (
    COMPARE,
    OUT,
    case,
    command,
    compared,
    differences,
    either,
    finished,
    trained,
    unbroken,
)

WAYS = ("same", "same", "resume", "resume", "names", "merge", "export", "report")


def _both(place: Place, one: Case, other: Case, delay: float) -> list[Outcome]:
    first = place.forks.start(one)
    time.sleep(delay)
    second = place.forks.start(other)
    return [first.wait(), second.wait()]


def refused(outcome: Outcome, folder: str) -> list[str]:
    """What is wrong with how the second is refused."""
    if outcome.rc == 2 and not outcome.traceback and folder in outcome.stderr.splitlines()[-1]:
        return []
    return [f"expected to be refused by the folder's name, exit 2: {outcome}"]


def _same(place: Place, rng: random.Random, name: str, resuming: bool) -> Verdict:
    """Twice the same command; `resuming`: the second goes on in what the first is at work in."""
    expected, delay = unbroken(place, name) / OUT, rng.choice([0.0, rng.random() * (1.5 if name in COMPARE else 0.4)])
    words = case(place, name)
    outcomes = _both(place, words, case(place, name, "--resume") if resuming else words, delay)
    problems = [f"{outcome}" for outcome in outcomes if outcome.rc not in (0, 2) or outcome.traceback]
    won = [outcome for outcome in outcomes if outcome.rc == 0]
    lost = [outcome for outcome in outcomes if outcome.rc == 2]
    # the second may come when the first has ended
    late = resuming and len(won) == 2 and ("finished already" in won[1].stdout or name in COMPARE)
    if len(won) != 1 and not late:
        problems.append(f"{len(won)} of two have ended well: {' and '.join(map(str, outcomes))}")
    for outcome in lost:
        problems += refused(outcome, OUT)
    problems += differences(expected, place.folder / OUT)
    what = f"{name} twice{', the second with --resume' if resuming else ''}, {delay:.3f} s apart"
    return Verdict(what, problems, {"refused": len(lost)})


def _names(place: Place, rng: random.Random, name: str) -> Verdict:
    """Two with the default names: each has a folder of its own."""
    expected = unbroken(place, name) / OUT
    words = command(place, name)
    plain = replace(case(place, name), argv=words[: words.index("--output-dir")])
    outcomes = _both(place, plain, plain, rng.choice([0.0, 0.0, rng.random() * 0.2]))
    problems = [f"{outcome}" for outcome in outcomes if outcome.rc != 0]
    folders = sorted((place.folder / "runs").iterdir())
    if len(folders) != 2:
        problems.append(f"two runs are in {[folder.name for folder in folders]}")
    for folder in folders:
        problems += [p for p in differences(expected, folder) if ".folder is " not in p]
    return Verdict(f"{name} twice, by default names", problems)


def _derived(place: Place, rng: random.Random, name: str) -> Verdict:
    """Twice the same export."""
    scenario, _, target = DERIVED[name]
    expected = made(place, name)
    finished(place, scenario)
    outcomes = _both(place, derived(place, name), derived(place, name), rng.choice([0.0, rng.random() * 0.5]))
    problems = [f"{outcome}" for outcome in outcomes if outcome.rc not in (0, 2) or outcome.traceback]
    if sorted(outcome.rc for outcome in outcomes) != [0, 2]:
        problems.append(f"one should be refused: {' and '.join(map(str, outcomes))}")
    for outcome in outcomes:
        problems += refused(outcome, target) if outcome.rc == 2 else []
    return Verdict(f"{name} twice", problems + differences(expected, place.folder), {"refused": 1})


def _report(place: Place, rng: random.Random, name: str) -> Verdict:
    """The page of a comparison that is under way."""
    expected, delay = unbroken(place, name) / OUT, rng.random() * 1.5
    outcomes = _both(place, case(place, name), Case(("report", OUT), cwd=place.folder, limit_s=60), delay)
    problems = [] if outcomes[0].rc == 0 else [f"compare: {outcomes[0]}"]
    if outcomes[1].traceback or outcomes[1].rc not in (0, 2, 3):
        problems.append(f"report: {outcomes[1]}")
    return Verdict(f"report after {delay:.3f} s of {name}", problems + differences(expected, place.folder / OUT))


def _pair(place: Place, seed: int, index: int) -> Verdict:
    rng = PAIRS.random(seed, index)
    way = WAYS[index % (4 if place.few else len(WAYS))]
    name = rng.choice(trained(place) if rng.random() < 0.6 else either(place))
    if way == "names":
        return _names(place, rng, name)
    if way in ("merge", "export"):
        return _derived(place, rng, way)
    if way == "report":
        return _report(place, rng, rng.choice(compared(place)))
    return _same(place, rng, name, resuming=way == "resume")


PAIRS = Kind(
    "pairs",
    "two processes on one folder (`train`, `compare`, `--resume`, `merge`, `export`, `report` beside `compare`, "
    "default names): one wins and ends as if alone, the other is refused by name with exit 2; default names differ",
    56, _pair, quick=8, fast=1,
)  # fmt: skip

KINDS = (PAIRS,)
