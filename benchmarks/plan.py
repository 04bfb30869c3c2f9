"""Predicted against measured peak memory of a training step: methods x shapes x the ways to train fast and lean.

    PYTHONPATH=src python benchmarks/plan.py --out plan.jsonl --table docs/results/plan.md      on a CUDA device
    PYTHONPATH=src python benchmarks/plan.py --tiny --device cpu --out tiny.jsonl               a check of this script
    PYTHONPATH=src python benchmarks/plan.py --out plan.jsonl --replay --table docs/results/plan.md    measures nothing
    PYTHONPATH=src python benchmarks/plan.py --check-recorded    predicts the recorded cells, held to what was measured

All cells are predicted first, from configs alone and without the device. Then each shape's are measured in a process
of its own, side by side as far as the predictions say that they fit onto the device together: memory is counted by each
process's allocator, so they do not see each other. Weights are random, made on the device; a step is the training
loop's own. Cells predicted not to fit are skipped, and said so. One JSON line for each cell: the prediction by term
and moment, the measurement by moment.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from plan_cells import SHAPES, TINY, UNSEEN, Cell, by_shape, cells, needed, predict
from plan_measure import Room, line, work
from plan_page import errors, page

#: cells measured on an NVIDIA H200
RECORDED = Path(__file__).parents[1] / "docs/results/plan.jsonl"
#: share of a device's memory that processes may take together
SHARE = 0.93
#: of the errors of predicted allocated bytes, as shares of what was measured
MEDIAN, WORST = 0.01, 0.08
#: processes that predict
_PREDICTORS = max(1, min(14, (os.cpu_count() or 2) - 2))


def predicted(chosen: list[Cell], device: str, processes: int) -> list[dict[str, Any]]:
    """All predictions, in order, made by processes that see no device."""
    begin = time.perf_counter()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = list(pool.map(predict, chosen, [device] * len(chosen)))
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if seen is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = seen
    print(f"{len(found)} cells predicted in {time.perf_counter() - begin:.0f} s", flush=True)
    return found


def run(chosen: list[Cell], args: argparse.Namespace) -> None:
    begin = time.time()
    found = predicted(chosen, args.device, args.predictors)
    total = 2**62
    if args.device == "cuda":
        # by the driver's own tool of a process that ends: this one takes no context of the device
        total = int(SHARE * _memory())
    measurable = []
    for cell in found:
        if "predicted" in cell and needed(cell) > total:
            cell["skipped"] = "predicted not to fit"
        if "skipped" in cell:
            with args.out.open("a") as file:
                file.write(json.dumps(cell) + "\n")
            print(line(cell), flush=True)
        else:
            measurable.append(cell)
    context = multiprocessing.get_context("spawn")
    room, lock = Room(context, total), context.Lock()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    workers = [
        context.Process(target=work, args=(mine, args.device, args.out, room, lock, begin + args.budget_seconds))
        for _, mine in by_shape(measurable)
    ]
    running: list[Any] = []
    for worker in workers:
        while len(running) >= args.jobs:
            running = [process for process in running if process.is_alive()]
            time.sleep(0.2)
        worker.start()
        running.append(worker)
    for worker in workers:
        worker.join()
        if worker.exitcode:
            print(f"a process ended with {worker.exitcode}: its shape's other cells are not measured", flush=True)
    print(f"{time.time() - begin:.0f} s in all", flush=True)


def _memory() -> int:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_free).result()


def _free() -> int:
    return int(torch.cuda.mem_get_info()[0])


def replayed(path: Path, processes: int) -> list[dict[str, Any]]:
    """All cells of a file; those that were measured are predicted again, with the planner as it is now, from configs
    alone."""
    found = [json.loads(text) for text in path.read_text().splitlines()]
    measured = [cell for cell in found if "measured" in cell]
    chosen = [Cell(**{name: cell[name] for name in Cell.__dataclass_fields__}) for cell in measured]
    devices = {"cpu" if cell["device"] == "cpu" else "cuda" for cell in measured}
    for cell, again in zip(measured, predicted(chosen, *devices, processes), strict=True):
        if "predicted" in again:
            cell["replayed"] = again["predicted"]
            cell["replayed_with"] = {"torch": torch.__version__, "transformers": transformers.__version__}
            print(line({**cell, "predicted": cell["replayed"]}), flush=True)
    return found


def within_limits(cells: list[dict[str, Any]]) -> bool:
    """Say how far the predictions of today are from what was measured, and whether allocated bytes keep the limits."""
    measured = [cell for cell in cells if "measured" in cell]
    kept = all("replayed" in cell for cell in measured)
    for title, some in (
        ("compiled", [cell for cell in measured if cell["compiled"]]),
        ("eager", [cell for cell in measured if not cell["compiled"]]),
        ("all", measured),
    ):
        for kind in ("allocated", "reserved"):
            found = [abs(error) for error in errors(some, kind, "replayed")]
            if not found:
                continue
            median, worst = statistics.median(found), max(found)
            print(f"{title:<9} {len(found):>3} cells, {kind}: median {median:.2%}, worst {worst:.2%}")
            kept &= kind == "reserved" or (median <= MEDIAN and worst <= WORST)
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--out", type=Path, help="JSON lines, appended to")
    add("--device", default="cuda")
    add("--tiny", action="store_true")
    add("--shapes", nargs="*", help="all by default")
    add("--methods", nargs="*", help="all by default")
    add("--budget-seconds", type=float, default=1e9, help="no cell begins later; the most important come first")
    add("--jobs", type=int, default=6, help="shapes that are measured side by side")
    add("--predictors", type=int, default=_PREDICTORS, help="processes that predict, each on one core")
    add("--table", type=Path, help="write the page from --out")
    add("--only-table", action="store_true", help="measure nothing")
    add("--replay", action="store_true", help="predict the cells of --out again; measures nothing")
    add(
        "--check-recorded",
        action="store_true",
        help="the same of --out or docs/results/plan.jsonl, writing nothing; fails beyond the limits",
    )
    add("--unseen", nargs="*", default=list(UNSEEN), help="shapes that the page calls unseen")
    args = parser.parse_args()
    if args.check_recorded:
        return 0 if within_limits(replayed(args.out or RECORDED, args.predictors)) else 1
    if args.out is None:
        parser.error("--out is needed")
    if args.replay:
        cells_again = replayed(args.out, args.predictors)
        args.out.write_text("".join(json.dumps(cell) + "\n" for cell in cells_again))
    elif not args.only_table:
        run(cells(args.shapes or list(TINY if args.tiny else SHAPES), args.methods), args)
    if args.table:
        found = [json.loads(text) for text in args.out.read_text().splitlines()]
        args.table.write_text(page(found, args.unseen))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
