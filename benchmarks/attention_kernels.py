"""Attention kernels against float64, forward and gradients: which are finite and right, by mask, type and size; and a
plain transformers loop on padded rows, with cuDNN's attention and without.

    PYTHONPATH=src python benchmarks/attention_kernels.py --out kernels.jsonl --seconds 70 --jobs 8
    PYTHONPATH=src python benchmarks/attention_kernels.py --out tiny.jsonl --tiny
    PYTHONPATH=src python benchmarks/attention_kernels.py --out kernels.jsonl --page docs/results/kernels.md

The first measures on a CUDA device, the second checks this script anywhere, the third measures nothing.
One JSON line for each call and kernel, as it is found; what a file has already is not measured again. A process of its
own measures, and is followed by another one where the device gave up: then the call is recorded as what broke it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
import transformers
from attention_page import page, table
from plain_loop import LOOPS, plain_loop

from spectune.errors import first_line
from spectune.health.attention_cases import FEW, AttentionCase, cases
from spectune.health.attention_check import check_case

#: a worker that broke down is followed by another one so often
MOST_WORKERS = 12
BROKEN, LATE = "broke the device", "did not end in the time given"


def recorded(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wanted(args: argparse.Namespace) -> Iterator[AttentionCase]:
    found = iter(FEW) if args.tiny else cases()
    yield from islice((case for case in found if case.length <= args.longest), args.most)


def write(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def work(args: argparse.Namespace) -> None:
    """Measure what the file has not, until the time is over. The case at hand stands in a file beside it."""
    device, at_hand = torch.device(args.device), args.out.with_suffix(f".at_hand{args.number}")
    torch.backends.cuda.matmul.allow_tf32 = False
    lines = recorded(args.out)
    known = {line["name"] for line in lines if line["kind"] == "kernel"}
    if args.number == 0 and not any(line["kind"] == "machine" for line in lines):
        write(args.out, {"kind": "machine", **machine(device)})
    if not args.no_loop:
        loops = {line["name"] for line in lines if line["kind"] == "loop"}
        for number, ((side, spoilt), cudnn) in enumerate(product(LOOPS, (True, False))):
            name = f"{side}, cudnn={cudnn}{', spoilt memory' if spoilt else ''}"
            if name not in loops and number % args.jobs == args.number:
                line = {"kind": "loop", "name": name, "cudnn": cudnn, "side": side, "spoilt": spoilt}
                at_hand.write_text(json.dumps(line))
                write(args.out, {**line, **plain_loop(device, cudnn=cudnn, side=side, spoilt=spoilt, tiny=args.tiny)})
    for number, case in enumerate(wanted(args)):
        if time.time() > args.until:
            return
        if number % args.jobs != args.number:
            continue
        if str(case) in known:
            continue
        at_hand.write_text(json.dumps({"kind": "kernel", "name": str(case), "case": asdict(case), "kernel": "all"}))
        try:
            findings = check_case(case, device)
        except torch.OutOfMemoryError as error:
            write(args.out, {**json.loads(at_hand.read_text()), "status": "out of memory", "why": first_line(error)})
            continue
        for finding in findings:
            write(
                args.out,
                {
                    "kind": "kernel",
                    "name": str(case),
                    "case": asdict(case),
                    "kernel": finding.kernel,
                    "status": finding.status,
                    "errors": finding.errors,
                    "why": finding.why,
                },
            )
    write(args.out, {"kind": "whole", "number": args.number, "jobs": args.jobs})


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "transformers": transformers.__version__,
    }


def run(args: argparse.Namespace, until: float, number: int) -> None:
    """One share of the calls: workers one after the other until all is measured or the time is over."""
    at_hand = args.out.with_suffix(f".at_hand{number}")
    for _ in range(MOST_WORKERS):
        command = [sys.executable, __file__, "--worker", "--until", str(until), "--number", str(number),
                   *sys.argv[1:]]  # fmt: skip
        status, why = BROKEN, ""
        try:
            code = subprocess.run(command, timeout=max(1, until + 30 - time.time())).returncode
            why = f"exit code {code}"
        except subprocess.TimeoutExpired:
            code, status = None, LATE
        if code == 0:
            break
        if at_hand.exists():
            write(args.out, {**json.loads(at_hand.read_text()), "status": status, "why": why})
            at_hand.unlink()
        if time.time() > until:
            break
    at_hand.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="JSON lines, appended to")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=75, help="no call begins later; the most telling ones come first")
    add("--tiny", action="store_true", help="a few calls, a tiny loop")
    add("--longest", type=int, default=10**6, help="tokens of a row")
    add("--most", type=int, help="calls")
    add("--no-loop", action="store_true", help="leave out the plain loop")
    add("--page", type=Path, help="write the page from --out, and measure nothing")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--until", type=float, help=argparse.SUPPRESS)
    add("--number", type=int, default=0, help=argparse.SUPPRESS)
    add("--jobs", type=int, default=1, help="processes side by side: cuDNN's plans take the host's time")
    args = parser.parse_args()
    if args.worker:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
        warnings.filterwarnings("ignore", category=UserWarning)  # why torch refuses a kernel, which is recorded
        work(args)
        return 0
    if args.page:
        args.page.write_text(page(recorded(args.out)))
        return 0
    begin = time.time()
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda number: run(args, begin + args.seconds, number), range(args.jobs)))
    print(table(recorded(args.out)))
    print(f"{time.time() - begin:.0f} s in all")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
