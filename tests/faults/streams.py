"""Streams that are closed, full, or read by somebody who leaves: output that is not needed does not stop the work."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from tests.faults.child import CLOSED, Case
from tests.faults.kinds import Kind, Place, Verdict
from tests.faults.material import OUT, case, differences, either, trained, unbroken

FULL = "/dev/full"
#: what is done to stdin, stdout and stderr
WAYS: dict[str, dict[str, str]] = {
    "stdout closed": {"stdout": CLOSED},
    "stderr closed": {"stderr": CLOSED},
    "all closed": {"stdin": CLOSED, "stdout": CLOSED, "stderr": CLOSED},
    "stdout full": {"stdout": FULL},
    "stderr full": {"stderr": FULL},
    "both full": {"stdout": FULL, "stderr": FULL},
    "| head -1": {"stdout": "pipe"},
    "2>&1 | head -1": {"stdout": "pipe", "stderr": "pipe"},
    "stderr | head -1": {"stderr": "pipe"},
}


def head(pipe: Path) -> None:
    """Read a line, and leave."""
    with open(pipe, "rb", buffering=0) as file:
        while (letter := file.read(1)) not in (b"", b"\n"):
            assert len(letter) == 1


def _streamed(place: Place, seed: int, index: int) -> Verdict:
    rng = STREAMED.random(seed, index)
    way = [*WAYS][index % len(WAYS)]
    name = rng.choice(trained(place) if rng.random() < 0.6 else either(place))
    as_json = rng.random() < 0.25
    how: dict[str, Any] = dict(WAYS[way])
    expected = unbroken(place, name) / OUT
    reader = None
    if "pipe" in how.values():
        pipe = place.folder / "pipe"
        os.mkfifo(pipe)
        how = {key: str(pipe) if value == "pipe" else value for key, value in how.items()}
        reader = threading.Thread(target=head, args=(pipe,))
        reader.start()
    words: Case = case(place, name, *(["--json"] if as_json else []), **how)
    outcome = place.forks.run(words)
    if reader is not None:
        reader.join(timeout=5)
    problems = differences(expected, place.folder / OUT)
    # an answer that nobody could be given is a failure, once the work is done
    allowed = (0, 1) if as_json and "stdout" in how else (0,)
    if outcome.rc not in allowed or outcome.traceback or "Exception ignored" in outcome.stderr:
        problems.append(f"expected exit {' or '.join(map(str, allowed))}: {outcome}")
    return Verdict(f"{name}{' --json' if as_json else ''}, {way}", problems)


STREAMED = Kind(
    "streams",
    "`train` and `compare` with streams closed, full, or read by `head -1`: the work ends as it should, exit 0",
    45, _streamed, quick=9, fast=1,
)  # fmt: skip

KINDS = (STREAMED,)
