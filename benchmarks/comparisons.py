"""Every method on three tasks from gpt2-27m: learning-rate search, three seeds, intervals, a verdict, and costs.

    python benchmarks/comparisons.py run --base BASES/gpt2-27m --data DATA --work WORK --workers 8 [--tasks e2e,trec]
    python benchmarks/comparisons.py pages --work WORK --out docs/results
    python benchmarks/comparisons.py archive --work WORK --out OUT                without weights, in pieces
    python benchmarks/comparisons.py logs                                        pages from the logs alone

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
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

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


COMMON = {"lr_scheduler_type": "linear", "warmup_steps": 0.06, "weight_decay": 0.0, "max_grad_norm": 1.0}
TASKS = {
    "e2e": Task(
        "E2E: sentences from records of a restaurant",
        {**COMMON, "num_train_epochs": 1, "per_device_train_batch_size": 64, "separator": "\n", "max_length": 256},
        generate_rows=630,
        fractions="100,300,1000,3000,10000,1",
        curve_methods=("full", "lora", "prompt"),
        note="Judged on test.jsonl: 630 records with all their human references.",
    ),
    "trec": Task(
        "TREC: the type of a question, six labels",
        {**COMMON, "num_train_epochs": 2, "per_device_train_batch_size": 32, "separator": "\n", "max_length": 128},
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
        flags += ["--set", f"{key}={value!r}" if isinstance(value, str) else f"{key}={value}"]
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


#: cost fields of a run: taken from the runs that had a GPU to themselves
COST_FIELDS = (
    "peak_memory_bytes",
    "predicted_memory_bytes",
    "memory_prediction_source",
    "train_tokens_per_second",
    "decode",
    "inference_overhead_range",
    "inference_overhead_merged_range",
    "swap_seconds",
    *(f"decode_tokens_per_second{which}{what}" for which in ("", "_base", "_merged") for what in ("", "_spread")),
)


def pages_of(args: argparse.Namespace, name: str) -> None:
    """docs/results/<task>.md, .json and .html, from the results alone; rows and weights are not published."""
    from spectune.comparing import Comparison
    from spectune.comparing.advising.recommend import recommend
    from spectune.reporting import write_reports
    from spectune.reporting.tables import comparison_markdown

    task, folder = TASKS[name], merge(args.work, name)
    content = Comparison.from_runs(folder).content
    files = (args.work / "costs").glob("*/comparison.json") if name == "e2e" else ()
    alone = {cost["name"]: cost for file in files for cost in json.loads(file.read_text())["runs"]}
    for found in content["runs"]:
        cost = alone.get(found["name"], {})
        found.update({field: cost.get(field, {} if field.endswith("memory_bytes") else None) for field in COST_FIELDS})
        # minutes of a run among others say nothing: steps at the speed that was measured alone
        found["train_seconds"] = found["train_tokens"] / cost["train_tokens_per_second"] if cost else None
    content["recommendation"] = recommend(content)
    write_reports(content, folder)
    settings = ", ".join(f"{key} {value!r}" for key, value in task.settings.items())
    environment = content["environment"]
    versions = ", ".join(f"{package} {version}" for package, version in environment["packages"].items())
    lines = [
        f"# {task.title}",
        "",
        f"Base gpt2-27m, {content['data']['train_rows']:,} training rows, {content['data']['valid_rows']:,} for "
        f"validation. {task.note} The same for every method: {settings}.",
        "",
        comparison_markdown(content).strip(),
        "",
        *data_curve(content),
        *PUBLISHED.get(name, ()),
        "## How it was measured",
        "",
        f"{environment['device']}, {content['base']['dtype']} with TF32 products, {versions}, spectune "
        f"{environment['spectune']}. Losses and metrics: all methods at the same time, each in processes of its own. "
        f"Memory and speed: {COST_STEPS} steps, one method after another with a GPU to itself; training time is the "
        "steps at that speed. Made by `python benchmarks/comparisons.py run` and `pages`; "
        f"[{name}.json]({name}.json) has the numbers.",
        "",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    for found in content["runs"]:
        found["forgetting_by_passage"] = None
    (args.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shutil.copy(folder / "report.html", args.out / f"{name}.html")


def data_curve(content: dict[str, Any]) -> list[str]:
    """Validation loss by method and number of rows; and how far the last weights are above the best ones."""
    points = content["curves"]
    if not points:
        return []
    counts = sorted({point["rows"] for point in points})
    labels = {arm["name"]: arm["label"] for arm in content["arms"]}
    head = "| method | " + " | ".join(f"{count:,} rows" for count in counts) + " |"
    lines = ["## Validation loss by number of rows", "", head, "|---|" + "---:|" * len(counts)]
    for arm in labels:
        cells = []
        for count in counts:
            mine = [point for point in points if point["name"] == arm and point["rows"] == count]
            if not mine:
                cells.append("-")
                continue
            best = sum(point["valid_loss"] for point in mine) / len(mine)
            last = sum(point["last_valid_loss"] for point in mine) / len(mine)
            cells.append(f"{best:.3f}" + (f" (+{last - best:.3f})" if last - best > 0.0005 else ""))
        lines.append(f"| {labels[arm]} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "At the rate found on all rows; at most 20 passes over the rows and never more steps than with all of them; "
        "validated five times, the best weights count. In brackets: how much higher the loss was after the last step.",
        "",
    ]


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


def pages_from_logs(logs: Path, out: Path) -> None:
    """docs/results/<task>.md from what the commands printed, where the folders of their runs are gone.

    The final runs are there, seed by seed, and the rates; the losses of single rows are not, and so neither the paired
    tests nor a verdict.
    """
    for name, task in TASKS.items():
        (out / f"{name}.md").write_text(log_page(name, task, read_log(logs / f"{name}.txt")), encoding="utf-8")


def read_log(path: Path) -> dict[str, dict[str, Any]]:
    """What the commands of a task printed, by the methods' labels: `runs` (a dict of numbers for each seed), the rates
    that were tried (`tried`, `low`, `high`, `best`, `edge`), and `forgetting` (mean, half its interval), if printed."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if search := re.match(r"(.+?): best of (\d+) rates from (\S+) to (\S+) .*?: ([\d.e-]+)(;.*)$", line):
            arm = found.setdefault(search[1], {"runs": []})
            arm |= {"tried": int(search[2]), "low": search[3], "high": search[4], "best": float(search[5])}
            arm["edge"] = next((side for side in ("low", "high") if f"it is the {side}est tried" in line), None)
        elif seed := re.match(r"(.+?), seed (\d+): (.*?);", line):
            values = dict(re.findall(r"(\w+) (-?[\d.e-]+)", seed[3]))
            found.setdefault(seed[1], {"runs": []})["runs"].append({k: float(v) for k, v in values.items()})
        elif cells := re.match(r"(\S.*?) {2,}\S+ +\S+%? +\S+ ±\S+ +\S+ +(\S+) ±(\S+)$", line):
            found[cells[1]]["forgetting"] = (float(cells[2]), float(cells[3]))
    return found


def log_page(name: str, task: Task, found: dict[str, dict[str, Any]]) -> str:
    names = list(dict.fromkeys(key for arm in found.values() for run in arm["runs"] for key in run))
    forgets = any("forgetting" in arm for arm in found.values())
    head = ["method", "seeds", *(f"{key} (mean ± SD over seeds)" for key in names)]
    head += ["forgetting (nats per token, 95%)"] if forgets else []
    head += ["learning rate", "rates tried"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label, arm in sorted(found.items(), key=lambda item: statistics.fmean(r["loss"] for r in item[1]["runs"])):
        row = [label, str(len(arm["runs"]))]
        for key in names:
            values = [run[key] for run in arm["runs"]]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            row.append(f"{statistics.fmean(values):.4g}{spread}")
        if forgets:
            row.append(f"{arm['forgetting'][0]:.2f} ± {arm['forgetting'][1]:.2f}" if "forgetting" in arm else "-")
        row.append(f"{arm['best']:g}" + (f" (the {arm['edge']}est tried)" if arm["edge"] else ""))
        row.append(f"{arm['tried']}, {arm['low']} to {arm['high']}")
        lines.append(f"| {' | '.join(row)} |")
    settings = ", ".join(f"{key} {value!r}" for key, value in {**task.settings, **LOGGED.get(name, {})}.items())
    return "\n".join(
        [
            f"# {task.title}",
            "",
            "**Not the whole of it.** The folders of these runs were lost with the machine they ran on; what is here "
            f"is what the commands printed ([logs/{name}.txt](logs/{name}.txt)). The losses of single rows are gone, "
            "so there are no paired tests and no verdict here, and no speed or memory: the methods ran side by side.",
            "",
            f"Base gpt2-27m. {task.note} The same for every method: {settings}. Each method's learning rate by "
            "successive halving on validation rows with other seeds, then final runs; loss in nats per target token, "
            "on test rows.",
            "",
            *lines,
            "",
            *PUBLISHED.get(name, ()),
            *READING.get(name, ()),
            "Measured on two NVIDIA H100 80GB, float32 with TF32 products, torch 2.11.0, transformers 5.17.0. Made by "
            "`python benchmarks/comparisons.py run` and `logs`.",
            "",
        ]
    )


#: what the logged runs had otherwise than TASKS has now
LOGGED = {"trec": {"num_train_epochs": 4}, "instruct_rasbt": {"num_train_epochs": 3}}

READING = {
    "e2e": [
        "What agrees: LoRA, DoRA and the adapter reach full fine-tuning's BLEU and ROUGE-L within the spread of seeds, "
        "with 1.7% to 3.5% of the weights, though full fine-tuning's loss is clearly lower (in the papers LoRA is "
        "above full fine-tuning in BLEU). What does not: prefix tuning, level with the others in the papers, is seven "
        "BLEU behind here; on a base of 27M weights 20 virtual tokens do not carry the task, and prompt tuning, which "
        "the papers find good only on very large models, is far behind, as they say.",
        "",
    ]
}

#: what the papers report of the same task on larger bases
PUBLISHED = {
    "e2e": [
        "## Beside the published numbers",
        "",
        "GPT-2 medium (355M), BLEU and ROUGE-L on the same test set, as the LoRA paper's table 3 gives them (beam "
        "search; its authors' recipe, run again by others, gave BLEU 68.7 to 68.9 for LoRA):",
        "",
        "| method | trained weights | BLEU | ROUGE-L |",
        "|---|---:|---:|---:|",
        "| full | 354.92M | 68.2 | 71.0 |",
        "| adapter (Adapter-L) | 11.09M | 68.9 | 71.3 |",
        "| adapter (Adapter-L) | 0.37M | 66.3 | 69.8 |",
        "| adapter (Adapter-H) | 11.09M | 67.3 | 70.7 |",
        "| prefix (PreLayer) | 0.35M | 69.7 | 71.4 |",
        "| LoRA | 0.35M | 70.4 | 71.8 |",
        "",
    ]
}


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
    logs = commands.add_parser("logs")
    logs.add_argument("--logs", type=Path, default=Path("docs/results/logs"))
    logs.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    if args.command == "archive":
        archive(args.work, args.out)
    elif args.command == "logs":
        pages_from_logs(args.logs, args.out)
    elif args.command == "run":
        args.work.mkdir(parents=True, exist_ok=True)
        run(args)
    else:
        for name in TASKS:
            if (args.work / "parts" / name).is_dir():
                pages_of(args, name)


if __name__ == "__main__":
    main()
