"""Every method on three tasks from gpt2-27m: learning-rate search, three seeds, intervals, a verdict, and costs.

    python benchmarks/comparisons.py run --base BASES/gpt2-27m --data DATA --work WORK --workers 8 [--tasks e2e,trec]
    python benchmarks/comparisons.py pages --work WORK --out docs/results
    python benchmarks/comparisons.py archive --work WORK --out OUT                without weights, in pieces

`run` makes one comparison a task. The methods run at the same time, each in a process of its own with `spectune
compare`, and their run folders are then put into one comparison: results do not depend on that, speed and memory do. So
costs are measured afterwards, one method after another with a GPU to itself, in a short comparison.
`pages` writes docs/results/<task>.md and .json from the results alone.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from comparison_pages import write_page

METHODS = ("full", "adapter", "prefix", "prompt", "lora", "bitfit", "dora", "ia3")


@dataclass(frozen=True)
class Task:
    """One data set and the recipe for it, the same for every method."""

    title: str
    settings: dict[str, Any]
    generate_rows: int
    fractions: str | None = None
    curve_methods: tuple[str, ...] = ()
    note: str = ""


#: A backslash and an n. A line break was meant: the first runs were given it in quotes that YAML does not look into.
#: Kept, as runs under other conditions are not put beside them.
SEPARATOR = "\\n"
COMMON = {"lr_scheduler_type": "linear", "warmup_steps": 0.06, "weight_decay": 0.0, "max_grad_norm": 1.0}
TASKS = {
    "e2e": Task(
        "E2E: sentences from records of a restaurant",
        {**COMMON, "num_train_epochs": 1, "per_device_train_batch_size": 64, "separator": SEPARATOR, "max_length": 256},
        generate_rows=630,
        fractions="100,300,1000,3000,10000,1",
        curve_methods=("full", "lora", "prompt"),
        note="Judged on test.jsonl: 630 records with all their human references.",
    ),
    "trec": Task(
        "TREC: the type of a question, six labels",
        {**COMMON, "num_train_epochs": 2, "per_device_train_batch_size": 32, "separator": SEPARATOR, "max_length": 128},
        generate_rows=0,
        note="Judged on test.jsonl without the 9 prompts that are also in train.jsonl.",
    ),
    "instruct_rasbt": Task(
        "Instructions: 935 short ones in the Alpaca template",
        {**COMMON, "num_train_epochs": 2, "per_device_train_batch_size": 8, "separator": "", "max_length": 384},
        generate_rows=110,
        note="Judged on test.jsonl.",
    ),
}
#: steps of the runs that only measure cost
COST_STEPS = 60


def prepare(name: str, data: Path, work: Path) -> dict[str, Path]:
    """The three files of a task; TREC's test rows whose prompts are in train are left out."""
    files = {part: data / name / f"{part}.jsonl" for part in ("train", "valid", "test")}
    if name == "trec":
        seen = {json.loads(line)["prompt"] for line in files["train"].read_text(encoding="utf-8").splitlines()}
        lines = files["test"].read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["prompt"] not in seen]
        # `label` is the fine type here, which is not what is asked for
        rows = [{key: json.loads(line)[key] for key in ("prompt", "completion")} for line in kept]
        files["test"] = work / "trec-test.jsonl"
        files["test"].parent.mkdir(parents=True, exist_ok=True)
        files["test"].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"trec: {len(lines) - len(kept)} test rows left out, whose prompts are in train", flush=True)
    return files


def command(args: argparse.Namespace, name: str, files: dict[str, Path], folder: Path, methods: str) -> list[str]:
    task = TASKS[name]
    flags = ["--model", args.base, "--data", files["train"], "--valid", files["valid"], "--test", files["test"]]
    flags += ["--methods", methods, "--output-dir", folder, "--resume", "--dtype", args.dtype]
    flags += ["--generate-rows", task.generate_rows]
    for key, value in {**task.settings, "per_device_eval_batch_size": args.eval_batch}.items():
        # as JSON: YAML reads its strings as they are, and Python's with their backslashes
        flags += ["--set", f"{key}={json.dumps(value)}"]
    if args.max_steps:
        flags += ["--set", f"max_steps={args.max_steps}"]
    return ["compare", *map(str, flags)]


def run(args: argparse.Namespace) -> None:
    """Costs alone, then all tasks with the methods side by side, curves last."""
    names, methods = args.tasks.split(","), args.methods.split(",")
    files = {name: prepare(name, args.data, args.work) for name in names}
    if "e2e" in names and not args.no_costs:
        halves = [methods[number :: args.gpus] for number in range(args.gpus)]
        with ThreadPoolExecutor(args.gpus) as pool:
            list(pool.map(lambda job: costs(args, files["e2e"], *job), enumerate(halves)))
    places: Queue[int] = Queue()
    for number in range(args.workers):
        places.put(number % args.gpus)

    def one(job: tuple[str, str, bool]) -> None:
        name, method, curve = job
        place, begin = places.get(), time.time()
        extra = ["--seeds", str(args.seeds)]
        extra += ["--fractions", TASKS[name].fractions or ""] if curve else []
        folder = args.work / "parts" / name / method
        # timed among others, decoding is worth nothing: as little of it as there can be
        few = "import spectune.comparing.measure as m; m.WARM_UPS, m.ROUNDS = 0, 2"
        code = spectune(args, name, files[name], folder, method, extra, f"{name}-{method}", place, first=few)
        places.put(place)
        what = "curve" if curve else "search and final runs"
        print(f"{name} {method}, {what}: exit {code}, {time.time() - begin:.0f} s", flush=True)

    jobs = [(name, method, False) for name in names for method in methods]
    jobs += [(name, method, True) for name in names for method in TASKS[name].curve_methods if method in methods]
    with ThreadPoolExecutor(args.workers) as pool:
        # a curve goes on in the folder of its method, and so waits for it
        done = {job: pool.submit(one, job) for job in jobs if not job[2]}
        for job in jobs:
            if job[2]:
                done[job] = pool.submit(lambda job=job: (done[(*job[:2], False)].result(), one(job)))
        for future in done.values():
            future.result()


def spectune(
    args: argparse.Namespace,
    name: str,
    files: dict[str, Path],
    folder: Path,
    methods: str,
    extra: list[str],
    log: str,
    gpu: int,
    first: str = "pass",
) -> int:
    """`spectune compare` in a process of its own; its exit code. `first`: Python that runs before."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*command(args, name, files, folder, methods), *extra]
    code = f"import sys; sys.argv = ['spectune', *sys.argv[1:]]; {first}; from spectune.cli import main; main()"
    with (args.work / f"{log}.log").open("a") as file:
        done = subprocess.run(
            [sys.executable, "-c", code, *flags], stdout=file, stderr=subprocess.STDOUT, env=_on(gpu), check=False
        )
    return done.returncode


def _on(gpu: int) -> dict[str, str]:
    """The environment of a process on one GPU (without one it says nothing)."""
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": str(gpu),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        # products of float32 matrices in TF32: five times as fast, and well below the noise of seeds
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    }


def costs(args: argparse.Namespace, files: dict[str, Path], gpu: int, methods: list[str]) -> None:
    """Memory and speed on E2E's rows, one method after another, with a GPU to themselves."""
    begin = time.time()
    # a rate at which nothing diverges: memory and speed do not depend on it
    steps = min(COST_STEPS, args.max_steps or COST_STEPS)
    extra = ["--set", f"max_steps={steps}", "--set", "learning_rate=1e-4", "--seeds", "1", "--generate-rows", "0"]
    code = spectune(args, "e2e", files, args.work / "costs" / str(gpu), ",".join(methods), extra, f"costs-{gpu}", gpu)
    print(f"costs of {', '.join(methods)}: exit {code}, {time.time() - begin:.0f} s", flush=True)


def merge(work: Path, name: str) -> Path:
    """One comparison from the folders of the methods: their run folders, and conditions that name them all."""
    whole = work / name
    parts = [path for path in sorted((work / "parts" / name).iterdir(), key=_order) if (path / "base").is_dir()]
    conditions = [json.loads((part / "conditions.json").read_text()) for part in parts]
    for part, found in zip(parts, conditions, strict=True):
        assert found["identity"] == conditions[0]["identity"], f"{part} ran under other conditions"
        for room in ("search", "runs", "curve", "base"):
            if (part / room).is_dir():
                shutil.copytree(part / room, whole / room, dirs_exist_ok=True, symlinks=True)
    # the first with a curve, if there is one: it knows the curve's rows
    first = max(conditions, key=lambda found: len(found["preset"]["curve"]))
    shapes = [found["scale"] for found in conditions]
    scale = [
        {**shape, "shares": {key: value for of in shapes for key, value in of[number]["shares"].items()}}
        for number, shape in enumerate(shapes[0])
    ]
    merged = {**first, "arms": [arm for found in conditions for arm in found["arms"]], "scale": scale}
    (whole / "conditions.json").write_text(json.dumps(merged, indent=2))
    return whole


def _order(path: Path) -> int:
    return METHODS.index(path.name)


#: what pages are made of; weights, figures and pages of the parts are not
KEPT = (
    "comparison.json",
    "conditions.json",
    "result.json",
    "search.json",
    "failed.json",
    "rows.jsonl",
    "metrics.jsonl",
    "passages.json",
)


def archive(work: Path, out: Path, piece_bytes: int = 12 * 2**20) -> None:
    """Everything that `pages` needs, as out/work.tar.xz.00 and so on, none larger than `piece_bytes`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=1) as tar:
        for path in sorted(work.rglob("*")):
            if path.is_file() and not path.is_symlink() and (path.name in KEPT or path.suffix == ".log"):
                tar.add(path, arcname=path.relative_to(work))
    content = buffer.getvalue()
    out.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(content), piece_bytes)):
        (out / f"work.tar.xz.{number:02d}").write_bytes(content[start : start + piece_bytes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--base", required=True)
    runner.add_argument("--data", type=Path, required=True)
    runner.add_argument("--work", type=Path, required=True)
    runner.add_argument("--tasks", default=",".join(TASKS))
    runner.add_argument("--methods", default=",".join(METHODS))
    runner.add_argument("--workers", type=int, default=8)
    runner.add_argument("--gpus", type=int, default=1)
    runner.add_argument("--seeds", type=int, default=3)
    runner.add_argument("--dtype", default="float32")
    runner.add_argument("--eval-batch", type=int, default=128)
    runner.add_argument("--max-steps", type=int, default=0, help="shorter, to try the script")
    runner.add_argument("--no-costs", action="store_true")
    pages = commands.add_parser("pages")
    pages.add_argument("--work", type=Path, required=True)
    pages.add_argument("--out", type=Path, default=Path("docs/results"))
    pack = commands.add_parser("archive")
    pack.add_argument("--work", type=Path, required=True)
    pack.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "archive":
        archive(args.work, args.out)
    elif args.command == "run":
        args.work.mkdir(parents=True, exist_ok=True)
        run(args)
    else:
        for name in TASKS:
            if (args.work / "parts" / name).is_dir():
                write_page(name, TASKS[name], merge(args.work, name), args.work / "costs", COST_STEPS, args.out)


if __name__ == "__main__":
    main()
