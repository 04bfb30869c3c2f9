"""Ordinary runs, as a user types them: what was planned of memory against what was measured.

    PYTHONPATH=src python -m benchmarks.ordinary --out ordinary.jsonl --seconds 540               on a CUDA device
    PYTHONPATH=src python -m benchmarks.ordinary --out ordinary.jsonl --page docs/results/ordinary.md
    PYTHONPATH=src python -m benchmarks.ordinary --out quick.jsonl --quick-8b --tree OLD --tree NEW
    PYTHONPATH=src python -m benchmarks.ordinary --out packed.jsonl --packed-8b
    PYTHONPATH=src python -m benchmarks.ordinary --out small.jsonl --small --only lora            a check of this script

Every cell is a `spectune train` or `spectune compare --quick` in a process of its own, with its defaults; bases are
folders with a tokenizer, random weights of three shapes and (where it was carried) the trained one of 27M. Several run
side by side on one GPU as far as memory and cores suffice: each counts its own memory, but seconds and tokens/s are
those of a shared card. A cell's JSON line is written as it ends; what has one without an error is not run again. The
line of a cell that failed has its error; what failed for want of memory beside others runs once more, alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.ordinary_8b import environment
from benchmarks.ordinary_cells import BASES, SMALL, Cell, cells
from benchmarks.ordinary_data import READY, unpack, unpack_small
from benchmarks.ordinary_page import newest, page, table

from benchmarks import ordinary_8b

ROOT = Path(__file__).parents[1]
_MEMORY_WORDS = ("out of memory", "OutOfMemory", "is predicted to take", "does not fit")


@dataclass
class Running:
    """A cell that runs: its process, its folder, and the most other cells that ran beside it."""

    cell: Cell
    process: subprocess.Popen[bytes]
    folder: Path
    begin: float
    beside: int = 0

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Scheduler:
    """Runs cells side by side: the first of the waiting ones that fits begins; behind one that has been passed over for
    a while, none does until it fits.

    Attributes:
        limit: GB that the claims of running cells may come to; a single cell may always begin.
        line: a cell and its output folder -> the command line.
        ready: whether what a cell needs is there yet.
        may_come: whether what is not ready may become so.
    """

    out: Path
    limit: float
    jobs: int
    timeout: float
    deadline: float
    line: Callable[[Cell, Path], list[str]]
    ready: Callable[[Cell], bool]
    may_come: Callable[[], bool]
    scratch: Path
    patience: float = 15
    running: list[Running] = field(default_factory=list)
    passed: dict[str, float] = field(default_factory=dict)

    def run(self, waiting: list[Cell]) -> None:
        waiting, again = list(waiting), set[str]()
        try:
            while (waiting or self.running) and time.monotonic() < self.deadline:
                for one in [one for one in self.running if one.process.poll() is not None or self._late(one)]:
                    line = self._ended(one)
                    if alone := _alone(one, line, again):
                        waiting.insert(0, alone)
                if waiting and not self.running and not any(map(self.ready, waiting)) and not self.may_come():
                    print(f"{len(waiting)} cells have no base: not run", flush=True)
                    return
                self._begin(waiting)
                time.sleep(0.1)
            if waiting or self.running:
                names = [one.cell.name for one in self.running]
                print(f"out of time: {len(waiting)} cells not begun, stopped: {', '.join(names) or 'none'}", flush=True)
        finally:
            for one in self.running:
                one.kill()

    def _begin(self, waiting: list[Cell]) -> None:
        for cell in [cell for cell in waiting if self.ready(cell)]:
            taken = sum(one.cell.claim for one in self.running)
            if len(self.running) >= self.jobs:
                return
            if self.running and taken + cell.claim > self.limit:
                if time.monotonic() - self.passed.setdefault(cell.name, time.monotonic()) > self.patience:
                    return
                continue
            waiting.remove(cell)
            folder = Path(tempfile.mkdtemp(dir=self.scratch))
            with (folder / "log").open("wb") as log:
                process = subprocess.Popen(
                    self.line(cell, folder / "run"), cwd=folder, env=environment(), stdout=log, stderr=log,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            self.running.append(Running(cell, process, folder, time.monotonic()))
            for one in self.running:
                one.beside = max(one.beside, len(self.running) - 1)

    def _late(self, one: Running) -> bool:
        return time.monotonic() - one.begin > self.timeout

    def _ended(self, one: Running) -> dict[str, Any]:
        cell, late = one.cell, one.process.poll() is None
        if late:
            one.kill()
        self.running.remove(one)
        found = read(one.folder / "run", cell.command)
        line: dict[str, Any] = {
            "cell": cell.name, "base": cell.base, "data": cell.data, "command": cell.command, "note": cell.note,
            "methods": cell.methods, "settings": cell.settings, "runs": found,
            "seconds": round(time.monotonic() - one.begin, 1), "beside": one.beside, "exit": one.process.returncode,
            "at": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }  # fmt: skip
        if late or one.process.returncode != 0 or len(found) < len(cell.methods):
            said = (one.folder / "log").read_text("utf-8", errors="replace").strip().splitlines()
            line["error"] = f"not done after {self.timeout:g} s" if late else " / ".join(said[-3:])[-600:]
            (self.out.parent / "logs").mkdir(exist_ok=True)
            name = cell.name.replace(" ", "_")
            shutil.copy(one.folder / "log", self.out.parent / "logs" / f"{name}.txt")
        shutil.rmtree(one.folder, ignore_errors=True)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(said_of(line), flush=True)
        return line


def _alone(one: Running, line: dict[str, Any], again: set[str]) -> Cell | None:
    """The same cell with the whole card, once, where it failed for want of memory that others had."""
    short = any(word in line.get("error", "") for word in _MEMORY_WORDS)
    if not short or not one.beside or one.cell.name in again:
        return None
    again.add(one.cell.name)
    cell = one.cell
    return Cell(cell.base, cell.data, cell.command, cell.methods, cell.settings, 1e9, cell.note)


def read(folder: Path, command: str) -> list[dict[str, Any]]:
    """What a finished command left in its folder, one entry a run; fewer than its methods where some failed."""
    path = folder / ("result.json" if command == "train" else "comparison.json")
    if not path.exists():
        return []
    content = json.loads(path.read_text("utf-8"))
    return [
        {
            "method": run["method"],
            "planned": run["predicted_memory_bytes"],
            "measured": run["peak_memory_bytes"],
            "source": run.get("memory_prediction_source"),
            "recomputed": run.get("gradient_checkpointing"),
            "learning_rate": run.get("learning_rate"),
            "steps": run.get("steps"),
            "train_seconds": run.get("train_seconds"),
            "tokens_per_second": run.get("train_tokens_per_second"),
            "phases": run.get("seconds_by_phase"),
            "execution": _execution(folder / (run.get("folder") or ".")),
        }
        for run in ([content] if command == "train" else content["runs"])
    ]


def _execution(folder: Path) -> dict[str, Any]:
    """How a run was executed, and on what."""
    path = folder / "environment.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return {key: known.get(key) for key in ("torch_compile", "cuda_graphs", "device", "packages")}


def said_of(line: dict[str, Any]) -> str:
    """A cell's line for people."""
    head = f"{line['cell']:<34} {line['seconds']:5.0f} s, {line['beside']} beside"
    for run in line["runs"]:
        head += f"\n    {run['method']:<8}"
        for kind in ("allocated", "reserved"):
            planned, measured = run["planned"].get(f"peak_{kind}"), run["measured"].get(f"train_{kind}")
            if planned and measured:
                head += f" {kind} {planned / 1e9:.2f} / {measured / 1e9:.2f} GB ({measured / planned - 1:+.1%})"
        head += f", {run['tokens_per_second']:,.0f} tokens/s"
    return head + (f"\n    FAILED: {line['error']}" if "error" in line else "")


def prepare(args: argparse.Namespace, wanted: set[str]) -> subprocess.Popen[bytes]:
    """Unpack what was carried, and begin to make the other bases, the largest first, in a process of its own."""
    shapes = {name: base.config for name, base in (SMALL if args.small else BASES).items() if name in wanted}
    if args.small:
        unpack_small(args.bases)
    else:
        unpack(args.payload, args.bases)
    # the largest takes longest, and its runs do
    order = json.dumps(shapes)
    device = "cpu" if args.small or args.device == "cpu" else "cuda"
    command = [sys.executable, "-m", "benchmarks.ordinary_data", "bases", str(args.bases), order, device]
    return subprocess.Popen(command, cwd=ROOT, env=environment())


def run(args: argparse.Namespace) -> None:
    begin = time.monotonic()
    done = {line["cell"] for line in newest(args.out) if "error" not in line}
    chosen = [cell for cell in cells(SMALL if args.small else BASES, args.steps, args.only) if cell.name not in done]
    if args.list:
        print("\n".join(f"{cell.name}: {' '.join(cell.settings)}, {cell.claim:g} GB" for cell in chosen))
        return
    maker = prepare(args, {cell.base for cell in chosen})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        Scheduler(
            out=args.out, limit=args.limit, jobs=args.jobs, timeout=args.timeout, deadline=begin + args.seconds,
            line=lambda cell, folder: cell.line(
                args.bases, args.bases / "rows", folder, "cpu" if args.small else args.device
            ),
            ready=lambda cell: (args.bases / cell.folder / READY).exists(),
            may_come=lambda: maker.poll() is None, scratch=args.bases,
        ).run(chosen)  # fmt: skip
    finally:
        maker.terminate()
        maker.wait()
    print(f"{len(chosen)} cells were asked for; {time.monotonic() - begin:.0f} s", flush=True)


def at_8b(args: argparse.Namespace) -> None:
    """The modes that have the card alone."""
    name = "tiny-llama" if args.small else "8B"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    maker = prepare(args, {name})
    base, rows = args.bases / name, args.bases / "rows/rows.jsonl"
    try:
        ordinary_8b.wait_for(base, maker)
        maker.wait()  # the card is free again
        if args.quick_8b:
            trees = [tree.resolve() for tree in args.tree] or [ROOT]
            ordinary_8b.compared(base, rows, trees, args.out, args.timeout, small=args.small)
        else:
            ordinary_8b.packed(base, rows, args.out, args.packed_steps, args.timeout, small=args.small)
    finally:
        maker.terminate()
        maker.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--out", type=Path, required=True, help="JSON lines, appended to")
    add("--seconds", type=float, default=1e9, help="of the whole; what still runs then is stopped")
    add("--timeout", type=float, default=400, help="seconds for one cell")
    add("--only", default="", help="regular expression of the cells' names")
    add("--steps", type=int, default=24, help="of a run of train; comparisons take half")
    add("--jobs", type=int, default=7, help="cells at once")
    add("--limit", type=float, default=110, help="GB of the card for cells that run at once")
    add("--device", default="auto")
    add("--bases", type=Path, default=Path(tempfile.gettempdir()) / "ordinary-bases", help="made there, and kept")
    add("--payload", type=Path, default=ROOT / ".gpu/ordinary", help="what `ordinary_data pack` wrote")
    add("--small", action="store_true", help="tiny shapes on the CPU")
    add("--list", action="store_true", help="print the cells that would run")
    add("--quick-8b", action="store_true", help="instead: a comparison of three methods at 8B, with each --tree")
    add("--tree", type=Path, action="append", default=[], help="source tree; repeatable, this one by default")
    add("--packed-8b", action="store_true", help="instead: train on packed short rows at 8B, against step_speed")
    add("--packed-steps", type=int, default=80)
    add("--page", type=Path, help="write the page from --out; runs nothing")
    args = parser.parse_args()
    args.out, args.bases = args.out.resolve(), args.bases.resolve()
    if args.page:
        args.page.write_text(page(newest(args.out)), encoding="utf-8")
        return 0
    if args.quick_8b or args.packed_8b:
        at_8b(args)
        return 0
    run(args)
    print(table(newest(args.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
