"""What accidents and damage do to the command: every kind of fault in tests/faults, and docs/reliability.md of it.

    PYTHONPATH=src python -m benchmarks.reliability                        all of it, as many at once as there are cores
    PYTHONPATH=src python -m benchmarks.reliability --quick --out x        few cases of each, elsewhere
    PYTHONPATH=src python -m benchmarks.reliability --only crash-train     one kind; --case N: one case of it alone

A case is given by kind, seed and number, and is the same whenever it is run. Nothing here needs a device or a network.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import queue
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.faults.child import Forks, server
from tests.faults.kinds import Kind, judged, kinds

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
#: failures that the page lists of a kind; the JSON beside it has all
LISTED = 10


@dataclass
class Tally:
    """What became of a kind's cases."""

    kind: Kind
    cases: int = 0
    held: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    failures: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, found: dict[str, Any]) -> None:
        self.cases += 1
        self.held += not found["problems"]
        self.seconds += found["seconds"]
        self.longest = max(self.longest, found["seconds"])
        self.counts.update(found["counts"])
        if found["problems"]:
            self.failures.append({key: found[key] for key in ("seed", "index", "what", "problems")})

    def record(self) -> dict[str, Any]:
        return {
            "promise": self.kind.promise, "cases": self.cases, "held": self.held, "seconds": round(self.seconds, 1),
            "longest_case_s": round(self.longest, 1), "counts": dict(self.counts), "failures": self.failures,
        }  # fmt: skip


def work(address: str, root: str, tasks: Any, found: Any) -> None:
    """A worker process: cases, until there are none."""
    by_name = {kind.name: kind for kind in kinds()}
    with Forks(address) as forks:
        for name, seed, index in iter(lambda: _next(tasks), None):
            verdict, seconds = judged(by_name[name], forks, Path(root), seed, index)
            found.put({
                "kind": name, "seed": seed, "index": index, "what": verdict.what, "problems": verdict.problems,
                "counts": verdict.counts, "seconds": seconds,
            })  # fmt: skip


def _next(tasks: Any) -> Any:
    """The next case; None: there are no more, or who had them is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        try:
            return tasks.get(timeout=5)
        except queue.Empty:
            continue
    return None


def cases(chosen: Sequence[Kind], seed: int, quick: bool, only_case: int | None) -> Iterator[tuple[str, int, int]]:
    """Of all kinds in turn: long ones do not wait at the end."""
    planned = []
    for kind in chosen:
        count = kind.cases
        indices = range(count)
        if quick:  # spread over all of them
            picked = kind.random(seed, -1).sample(indices, min(kind.quick, count))
        else:
            picked = list(indices) if only_case is None else [only_case]
        planned += [(place / len(picked), kind.name, index) for place, index in enumerate(picked)]
    yield from ((name, seed, index) for _, name, index in sorted(planned))


def run(chosen: Sequence[Kind], planned: list[tuple[str, int, int]], jobs: int) -> dict[str, Tally]:
    """All of these cases, in `jobs` processes."""
    context = multiprocessing.get_context("spawn")
    tasks, found = context.Queue(), context.Queue()
    tallies = {kind.name: Tally(kind) for kind in chosen}
    root = tempfile.mkdtemp(prefix="spectune-reliability-")
    begin = told = time.monotonic()
    try:
        with server() as address:
            workers = [context.Process(target=work, args=(address, root, tasks, found)) for _ in range(jobs)]
            for worker in workers:
                worker.start()
            for task in (*planned, *[None] * jobs):
                tasks.put(task)
            for number in range(1, len(planned) + 1):
                got = found.get(timeout=600)
                tallies[got["kind"]].add(got)
                for problem in got["problems"][:3]:
                    print(f"{got['kind']} {got['seed']} {got['index']}: {got['what']}: {problem[:500]}", flush=True)
                if time.monotonic() - told > 20:
                    told = time.monotonic()
                    print(f"{number} of {len(planned)} cases, {told - begin:.0f} s", flush=True)
            for worker in workers:
                worker.join()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return tallies


def about(seed: int, jobs: int, seconds: float) -> dict[str, Any]:
    """The machine, the versions, the day, and the command."""
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    command = shlex.join(["python", "-m", "benchmarks.reliability", *sys.argv[1:]])
    return {
        "date": datetime.date.today().isoformat(), "command": command, "seed": seed, "jobs": jobs,
        "seconds": round(seconds), "python": platform.python_version(), **packages,
        "machine": f"{platform.system()} {platform.release()}, {os.cpu_count()} cores",
    }  # fmt: skip


def page(known: dict[str, Any], tallies: dict[str, Tally]) -> str:
    total, held = sum(t.cases for t in tallies.values()), sum(t.held for t in tallies.values())
    lines = [
        "# Reliability", "",
        "What faults do to the command: kills, full disks, signals, closed streams, second processes, and damaged and "
        "hostile files. Made by `benchmarks/reliability.py`, which runs the kinds of tests/faults; how a fault is put "
        "in stands there. Each case is a process of its own, on a tiny base, on the CPU.", "",
        f"{held:,} of {total:,} cases held, {known['date']}: `{known['command']}`, seed {known['seed']}, "
        f"{known['jobs']} at once, {known['seconds']:,} s. {known['machine']}; Python {known['python']}, torch "
        f"{known['torch']}, transformers {known['transformers']}, safetensors {known['safetensors']}.", "",
        "| kind | cases | held | what is promised | counted |", "|---|---:|---:|---|---|",
    ]  # fmt: skip
    for name, tally in tallies.items():
        counted = ", ".join(f"{count:,} {what}" for what, count in sorted(tally.counts.items()))
        lines.append(f"| `{name}` | {tally.cases:,} | {tally.held:,} | {tally.kind.promise} | {counted} |")
    lines += ["", "## What did not hold", ""]
    failed = [tally for tally in tallies.values() if tally.failures]
    lines += [] if failed else ["Nothing."]
    for tally in failed:
        lines += [f"### {tally.kind.name}: {len(tally.failures):,} of {tally.cases:,}", ""]
        for failure in sorted(tally.failures, key=lambda failure: int(failure["index"]))[:LISTED]:
            again = f"--only {tally.kind.name} --seed {failure['seed']} --case {failure['index']}"
            problem = " ".join(failure["problems"][0].split())[:300].replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"- `{again}`: {failure['what']}: {problem}")
        if len(tally.failures) > LISTED:
            lines.append(f"- and {len(tally.failures) - LISTED:,} more, in the JSON beside this page")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases of each kind")
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", action="append", help="a kind; repeatable")
    parser.add_argument("--case", type=int, help="one case of that kind")
    parser.add_argument("--out", type=Path, help="a folder for page and JSON instead of docs/")
    given = parser.parse_args()
    everything = kinds()
    chosen = [kind for kind in everything if given.only is None or kind.name in given.only]
    if not chosen or len(chosen) < len(set(given.only or [])):
        parser.error(f"--only takes {', '.join(kind.name for kind in everything)}")
    planned, begin = list(cases(chosen, given.seed, given.quick, given.case)), time.monotonic()
    tallies = run(chosen, planned, min(given.jobs, len(planned)))
    known = about(given.seed, given.jobs, time.monotonic() - begin)
    for name, tally in tallies.items():
        print(f"{name}: {tally.held} of {tally.cases} held, {tally.seconds / max(1, tally.cases):.2f} s each")
    if given.case is None:
        target = PAGE if given.out is None else given.out / PAGE.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(known, tallies), encoding="utf-8")
        records = {name: tally.record() for name, tally in tallies.items()}
        target.with_suffix(".json").write_text(
            json.dumps({**known, "kinds": records}, indent=2) + "\n", encoding="utf-8"
        )
        print(f"written to {target} and {target.with_suffix('.json').name}")
    return 0 if all(tally.held == tally.cases for tally in tallies.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
