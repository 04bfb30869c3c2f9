"""Signals at any moment, once or twice: the run stops soon, says how to go on, and goes on to the same end."""

from __future__ import annotations

import signal
import time

from tests.faults.crashes import after_kill, point
from tests.faults.kinds import Kind, Place, Verdict
from tests.faults.material import COMPARE, OUT, case, either, resumed, unbroken

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: seconds from a signal to the end, on a busy machine
SOON = 10.0


def _signalled(place: Place, seed: int, index: int) -> Verdict:
    rng = SIGNALLED.random(seed, index)
    number, twice = rng.choice(SIGNALS), rng.random() < 0.3
    again = rng.choice([0.0, 0.002, 0.02]) if twice else None
    what = f"{number.name}{' twice' if twice else ''}"
    if rng.random() < 0.6:  # checkpointing, keeping the best, judging, writing the page
        name, at = point(place, either(place), (index % SIGNALLED.cases + rng.random()) / SIGNALLED.cases)
        fault = {"root": str(place.folder / OUT), "at": at, "number": int(number), "again": again}
        child = place.forks.start(case(place, name, faults=[("tests.faults.injection:interrupt", fault)]))
        what = f"{name}, {what} before call {at}"
    else:  # loading, attaching, steps, validation
        name = rng.choice(either(place))
        unbroken(place, name)
        seconds = 0.06 + rng.random() * (1.6 if name in COMPARE else 0.45)
        child = place.forks.start(case(place, name))
        time.sleep(seconds)
        child.signal(number)
        if again is not None:
            time.sleep(again)
            child.signal(number)
        what = f"{name}, {what} after {seconds:.3f} s"
    sent = time.monotonic()
    outcome = child.wait()
    waited = time.monotonic() - sent
    problems = after_kill(place, outcome)
    if outcome.rc not in (0, 130):
        problems.append(f"expected exit 130: {outcome}")
    if outcome.rc == 130 and not any(line.startswith("stopped:") for line in outcome.stderr.splitlines()):
        problems.append(f"does not say that it stopped: {outcome}")
    if "after" in what and waited > SOON and outcome.rc == 130:
        problems.append(f"ended {waited:.1f} s after the signal")
    return Verdict(what, problems + resumed(place, name, stopped=True)[1], {"stopped by it": int(outcome.rc == 130)})


SIGNALLED = Kind(
    "signals",
    "SIGINT, SIGTERM or SIGHUP at any moment, some twice: exit 130 within 10 s and a word on how to go on; `--resume` "
    "ends bit-equal",
    150, _signalled, quick=8, fast=1,
)  # fmt: skip

KINDS = (SIGNALLED,)
