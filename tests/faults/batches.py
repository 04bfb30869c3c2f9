"""A file of requests whose answering is killed, stopped, left without room or begun twice: whole lines are there, and
`--resume` ends with the same file to the byte."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.faults.child import Case, Outcome
from tests.faults.kinds import Kind, Place, Verdict
from tests.faults.material import material

REQUESTS = 24
OUTPUT = "out.jsonl"
WAYS = ("killed", "killed", "stopped", "no room", "twice")


def at_line(at: int, way: str, within: float, number: int) -> None:
    """In the child: what happens while line `at` is being written, once part of it is on the disk."""
    from spectune.files import line_file

    real, lines = os.pwrite, [0]

    def pwrite(descriptor: int, content: Any, place: int) -> int:
        lines[0] += 1
        if lines[0] != at:
            return real(descriptor, content, place)
        part = real(descriptor, bytes(content)[: int(within * len(content))], place)
        if way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "stopped":
            os.kill(os.getpid(), number)
            return part
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    line_file.os.pwrite = pwrite  # type: ignore[attr-defined]


def _requests(place: Place) -> Path:
    """Requests in a folder, some of which cannot be answered."""

    def make(folder: Path) -> None:
        rows: list[Any] = [
            {"prompt": f"number {i}", "id": i, "max_new_tokens": 1 + i % 7, "temperature": i % 2}
            for i in range(REQUESTS)
        ]
        rows[5], rows[11] = {"prompt": 5, "id": 5}, {"prompt": "x", "id": 11, "delta": "nobody"}
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return place.once("requests", make) / "in.jsonl"


def _case(place: Place, *more: str, cwd: Path | None = None, **how: Any) -> Case:
    words = ("generate", "--input", str(_requests(place)), "--output", OUTPUT, "--device", "cpu")
    return Case((*words, "--model", str(material(place) / "base"), *more), cwd=cwd or place.folder, **how)


def _whole(place: Place) -> bytes:
    def make(folder: Path) -> None:
        done = place.forks.run(_case(place, cwd=folder))
        assert done.rc == 1, done  # two requests have no answer

    return (place.once("answers", make) / OUTPUT).read_bytes()


def _problems(place: Place, outcome: Outcome, whole: bytes, wanted: int) -> list[str]:
    """What is wrong once it has ended for the first time."""
    problems = [] if outcome.rc == wanted and not outcome.traceback else [f"expected exit {wanted}: {outcome}"]
    there = (place.folder / OUTPUT).read_bytes() if (place.folder / OUTPUT).exists() else b""
    if not whole.startswith(there):
        problems.append(f"{OUTPUT} does not begin as it should")
    if wanted > 0 and there and not there.endswith(b"\n"):
        problems.append("part of a line is left")
    if wanted > 0 and "--resume" not in outcome.stderr:
        problems.append(f"does not say how to go on: {outcome}")
    return problems


def _batch(place: Place, seed: int, index: int) -> Verdict:
    rng = BATCHES.random(seed, index)
    whole, way = _whole(place), WAYS[index % len(WAYS)]
    at, within = rng.randrange(1, REQUESTS + 1), rng.random()
    number = rng.choice([signal.SIGINT, signal.SIGTERM])
    if way == "twice":
        first, second = place.forks.start(_case(place)), place.forks.start(_case(place))
        outcomes = sorted((first.wait(), second.wait()), key=lambda outcome: outcome.rc)
        problems = [f"{one}" for one, rc in zip(outcomes, (1, 2), strict=True) if one.rc != rc or one.traceback]
        problems += [] if OUTPUT in outcomes[1].stderr else [f"does not name the file: {outcomes[1]}"]
        what = "two at once"
    else:
        fault = ("tests.faults.batches:at_line", {"at": at, "way": way, "within": within, "number": int(number)})
        outcome = place.forks.run(_case(place, faults=(fault,)))
        wanted = {"killed": -signal.SIGKILL, "stopped": 130, "no room": 1}[way]
        problems, what = _problems(place, outcome, whole, wanted), f"{way} in line {at}"
        again = place.forks.run(_case(place, "--resume"))
        problems += [] if again.rc == 1 and not again.traceback else [f"--resume: {again}"]
    if (place.folder / OUTPUT).read_bytes() != whole:
        problems.append("ends with another file")
    return Verdict(what, problems)


BATCHES = Kind(
    "batches",
    "`generate --input --output` killed or stopped inside a line, without room, or begun twice: whole lines are there, "
    "a second writer is refused, and `--resume` ends with the same file to the byte",
    100, _batch, quick=10, fast=1,
)  # fmt: skip

KINDS = (BATCHES,)
