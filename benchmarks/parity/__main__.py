"""The command line; see the package."""

from __future__ import annotations

import json
import sys

if sys.argv[1:2] == ["--worker"]:
    from benchmarks.parity.worker import main as work

    work(json.loads(sys.argv[2]))
    raise SystemExit(0)

import argparse
import time
from pathlib import Path

import benchmarks.parity as package
from benchmarks.parity.driver import Plan, read, runs_of
from benchmarks.parity.paths import METHODS, PATHS
from benchmarks.parity.table import page
from benchmarks.parity.task import Order


def main() -> int:
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--base", help="a folder")
    parser.add_argument("--data", type=Path, help="a folder with train.jsonl and valid.jsonl")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--paths", nargs="*", default=[], help=f"all by default: {', '.join(PATHS)}")
    parser.add_argument("--steps", type=int, default=200, help="of the free run")
    parser.add_argument("--held", type=int, default=8, help="steps at given weights before it")
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--gpus", type=int, default=1, help="that they are spread over")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--list", action="store_true", help="print the runs in their order; makes none")
    parser.add_argument("--table", type=Path, help="write the page from --out; makes no run")
    args = parser.parse_args()
    unknown = sorted(set(args.paths) - set(PATHS))
    if unknown:
        parser.error(f"unknown paths: {', '.join(unknown)}; there are: {', '.join(PATHS)}")
    if args.table:
        args.table.write_text(page(read(args.out)), encoding="utf-8")
        return 0
    todo = {method: runs_of(method, args.device, args.paths) for method in args.methods}
    if args.list:
        print("\n".join(f"{method}: {', '.join(runs)}" for method, runs in todo.items()))
        return 0
    if args.base is None or args.data is None:
        parser.error("--base and --data are needed")
    held = min(args.held, args.steps)
    order = Order(args.base, str(args.data), args.device, args.steps, held, args.rows)
    done = {
        (line["method"], line["path"])
        for line in read(args.out)
        if "free" in line
        and [line[key] for key in ("steps", "held_steps", "rows")] == [order.steps, order.held_steps, order.rows]
        and (line["device"] == "cpu") == (args.device == "cpu")
    }  # fmt: skip
    todo = {method: [run for run in runs if (method, run) not in done] for method, runs in todo.items()}
    Plan(args.out.resolve(), order, args.workers, args.gpus, time.time() + args.budget_seconds).run(todo)
    return 0


raise SystemExit(main())
