"""The command line; see the package."""

from __future__ import annotations

import json
import sys

if sys.argv[1:2] == ["--worker"]:
    order = json.loads(sys.argv[2])
    if order["system"].startswith("unsloth"):
        # it patches torch, transformers and peft as it is imported, and asks to be the first
        try:
            import unsloth  # noqa: F401
        except Exception as error:
            print(f"unsloth: {error}", file=sys.stderr)  # the measurement itself says so once more, as its reason
    from benchmarks.step_speed.worker import main as work

    work(order)
    raise SystemExit(0)

import argparse
from pathlib import Path

import benchmarks.step_speed as package
from benchmarks.step_speed.driver import Plan
from benchmarks.step_speed.grid import REAL_SYSTEMS, SHAPES, SYSTEMS, TINY, cases, system
from benchmarks.step_speed.table import page


def main() -> int:
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="*", default=[], help=f"of the device, by default: {', '.join(SHAPES)}")
    parser.add_argument("--systems", nargs="*", default=[], help=f"all by default: {', '.join(SYSTEMS)}")
    parser.add_argument("--methods", nargs="*", default=[], help="all by default")
    parser.add_argument("--repeats", type=int, help="3 by default")
    parser.add_argument("--warmup", type=int, default=10, help="steps at least; until 5 in a row compile nothing")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--quick", action="store_true", help="at least 5 warm-up and 10 timed steps, 2 repeats")
    parser.add_argument("--rows", type=int, help="another batch size than the shape's")
    parser.add_argument("--budget-seconds", type=float, help="start nothing new after so many")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one measurement")
    parser.add_argument("--peak-tflops", type=float, help="of bf16 matrix products; 790 on CUDA (H100, H200, measured)")
    parser.add_argument("--allocator", default="expandable_segments:False", help="PYTORCH_ALLOC_CONF, for all systems")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, a check of this script")
    parser.add_argument("--real-data", action="store_true", help="rows as short as E2E's: packing, loss on completions")
    parser.add_argument("--list", action="store_true", help="print the cases in their order; measures nothing")
    parser.add_argument("--table", type=Path, help="write the page from --out; measures nothing")
    args = parser.parse_args()
    if args.table:
        args.table.write_text(page([json.loads(x) for x in args.out.read_text().splitlines()]), encoding="utf-8")
        return 0
    found = cases(
        TINY if args.tiny else SHAPES, args.device, names=args.shapes, systems=args.systems, methods=args.methods,
        known_systems=REAL_SYSTEMS if args.real_data else SYSTEMS,
    )  # fmt: skip
    if args.list:
        print("\n".join(f"{case.shape}: {case.method}, {system(case.system).label}" for case in found))
        return 0
    plan = Plan(
        out=args.out.resolve(), device=args.device, repeats=args.repeats or (2 if args.quick else 3),
        warmup=5 if args.quick else args.warmup, steps=10 if args.quick else args.steps, budget=args.budget_seconds,
        timeout=args.timeout, peak_tflops=args.peak_tflops or (790.0 if args.device == "cuda" else None),
        allocator=args.allocator, rows=args.rows,
    )  # fmt: skip
    plan.run(found)
    return 0


raise SystemExit(main())
