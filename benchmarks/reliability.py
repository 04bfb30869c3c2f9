"""What accidents and damage do to the command: every kind of fault in tests/faults, and docs/reliability.md of it.

    PYTHONPATH=src python -m benchmarks.reliability                        all of it, as many at once as there are cores
    PYTHONPATH=src python -m benchmarks.reliability --quick --out x        few cases of each, elsewhere
    PYTHONPATH=src python -m benchmarks.reliability --only crash-train     one kind; --case N: one case of it alone
    PYTHONPATH=src python -m benchmarks.reliability --accidents            what is nobody's doing; --damage: the rest
    PYTHONPATH=src python -m benchmarks.reliability --of a.json b.json     the page of runs that were made apart

A case is given by kind, seed and number, and is the same whenever it is run. Nothing here needs a device or a network.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
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
#: modules of tests.faults whose faults are nobody's doing
ACCIDENTS = tuple(
    f"tests.faults.{name}" for name in ("crashes", "disks", "signals", "streams", "pairs", "batches", "served")
)


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


def run(
    chosen: Sequence[Kind], planned: list[tuple[str, int, int]], jobs: int, limit_s: float = math.inf
) -> dict[str, Tally]:
    """All of these cases, in `jobs` processes; as many as `limit_s` seconds allow."""
    context = multiprocessing.get_context("spawn")
    tasks, found = context.Queue(), context.Queue()
    tallies = {kind.name: Tally(kind) for kind in chosen}
    root = tempfile.mkdtemp(prefix="spectune-reliability-")
    begin = told = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        address = stack.enter_context(server())
        for _ in range(jobs):
            worker = context.Process(target=work, args=(address, root, tasks, found), daemon=True)
            worker.start()
            stack.callback(worker.join)
            stack.callback(worker.terminate)
        for task in planned:
            tasks.put(task)
        for number in range(1, len(planned) + 1):
            try:
                got = found.get(timeout=min(600.0, max(0.0, begin + limit_s - time.monotonic())))
            except queue.Empty:
                print(f"{number - 1} of {len(planned)} cases: the others were not begun or not ended", flush=True)
                break
            tallies[got["kind"]].add(got)
            for problem in got["problems"][:3]:
                print(f"{got['kind']} {got['seed']} {got['index']}: {got['what']}: {problem[:500]}", flush=True)
            if time.monotonic() - told > 20:
                told = time.monotonic()
                print(f"{number} of {len(planned)} cases, {told - begin:.0f} s", flush=True)
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


def page(runs: list[dict[str, Any]], records: dict[str, dict[str, Any]]) -> str:
    total, held = (sum(record[key] for record in records.values()) for key in ("cases", "held"))
    lines = [
        "# Reliability", "",
        "What faults do to the command: kills, full disks, signals, closed streams, second processes, and damaged and "
        "hostile files. Made by `benchmarks/reliability.py`, which runs the kinds of tests/faults; how a fault is put "
        "in stands there. Each case is a process of its own, on a tiny base, on the CPU.", "",
        f"{held:,} of {total:,} cases held.", "",
    ]  # fmt: skip
    for known in runs:
        lines.append(
            f"- {known['date']}: `{known['command']}`, seed {known['seed']}, {known['jobs']} at once, "
            f"{known['seconds']:,} s. {known['machine']}; Python {known['python']}, torch {known['torch']}, "
            f"transformers {known['transformers']}, safetensors {known['safetensors']}."
        )
    lines += ["", "| kind | cases | held | what is promised | counted |", "|---|---:|---:|---|---|"]
    for name, record in records.items():
        counted = ", ".join(f"{count:,} {what}" for what, count in sorted(record["counts"].items()))
        lines.append(f"| `{name}` | {record['cases']:,} | {record['held']:,} | {record['promise']} | {counted} |")
    lines += ["", "## What did not hold", ""]
    failed = {name: record for name, record in records.items() if record["failures"]}
    lines += [] if failed else ["Nothing."]
    for name, record in failed.items():
        lines += [f"### {name}: {len(record['failures']):,} of {record['cases']:,}", ""]
        for failure in sorted(record["failures"], key=lambda failure: int(failure["index"]))[:LISTED]:
            again = f"--only {name} --seed {failure['seed']} --case {failure['index']}"
            lines.append(f"- `{again}`: {_plain(failure['what'], 160)}: {_plain(failure['problems'][0], 300)}")
        if len(record["failures"]) > LISTED:
            lines.append(f"- and {len(record['failures']) - LISTED:,} more, in the JSON beside this page")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _plain(text: str, most: int) -> str:
    """Text of a case as Markdown that shows it as it is."""
    kept = "".join(letter if letter.isprintable() else " " for letter in text)
    return "".join(f"\\{letter}" if letter in "\\|<>[]*_`#" else letter for letter in " ".join(kept.split())[:most])


def write(folder: Path, runs: list[dict[str, Any]], records: dict[str, dict[str, Any]]) -> None:
    """The page, and beside it a JSON that has every failure."""
    target = folder / PAGE.name
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(page(runs, records), encoding="utf-8")
    target.with_suffix(".json").write_text(json.dumps({"runs": runs, "kinds": records}, indent=1) + "\n", "utf-8")
    print(f"written to {target} and {target.with_suffix('.json').name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases of each kind")
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", action="append", help="a kind; repeatable")
    parser.add_argument("--case", type=int, help="one case of that kind")
    parser.add_argument("--accidents", action="store_true", help="kills, disks, signals, streams, second processes")
    parser.add_argument("--damage", action="store_true", help="damaged and hostile files")
    parser.add_argument("--seconds", type=float, default=math.inf, help="as many cases as that allows")
    parser.add_argument("--out", type=Path, default=PAGE.parent, help="a folder for page and JSON instead of docs/")
    parser.add_argument("--of", type=Path, nargs="+", metavar="JSON", help="the page of earlier runs; nothing is run")
    given = parser.parse_args()
    if given.of:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in given.of]
        records = {name: record for one in found for name, record in one["kinds"].items()}
        write(given.out, [run for one in found for run in one["runs"]], records)
        return 0
    everything = kinds()
    accidents = {kind.name for kind in everything if kind.case.__module__ in ACCIDENTS}
    chosen = [kind for kind in everything if given.only is None or kind.name in given.only]
    chosen = [kind for kind in chosen if not given.accidents or kind.name in accidents]
    chosen = [kind for kind in chosen if not given.damage or kind.name not in accidents]
    if not chosen or len(chosen) < len(set(given.only or [])):
        parser.error(f"--only takes {', '.join(kind.name for kind in everything)}")
    planned, begin = list(cases(chosen, given.seed, given.quick, given.case)), time.monotonic()
    tallies = run(chosen, planned, min(given.jobs, len(planned)), given.seconds)
    known = about(given.seed, given.jobs, time.monotonic() - begin)
    for name, tally in tallies.items():
        print(f"{name}: {tally.held} of {tally.cases} held, {tally.seconds / max(1, tally.cases):.2f} s each")
    if given.case is None:
        write(given.out, [known], {name: tally.record() for name, tally in tallies.items()})
    return 0 if all(tally.held == tally.cases for tally in tallies.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
