"""E2E from gpt2-27m: every method at several learning rates, one epoch each, validation loss after the last step.

    python benchmarks/e2e_reference.py --base BASES/gpt2-27m --data DATA/e2e --out results.jsonl --workers 4

The recipe: batch 64, AdamW without weight decay, 6% warm-up then linear to zero, clipping at 1.0; a sequence is prompt,
newline, completion, EOS; the loss is on completion and EOS. Each run is a process of its own. With `--table` it writes
docs/results/e2e_reference.md from the results instead of running anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

#: PEFT 0.21 with transformers 5.17 on the same recipe, at its best of two or three learning rates; measured elsewhere
PEFT = {
    "full": (0.977, "plain loop"),
    "lora": (1.052, "lr 6e-3"),
    "prefix": (1.365, "lr 0.1"),
    "prompt": (1.985, "lr 0.2"),
    "bitfit": (1.463, "biases unfrozen by hand, lr 3e-2"),
}
BARE = 4.07

GRID: dict[str, list[float]] = {
    "full": [1e-3, 2e-3, 3e-3],
    "lora": [4e-3, 6e-3, 8e-3],
    "bitfit": [3e-2, 4e-2, 6e-2],
    "prefix": [5e-2, 1e-1, 2e-1],
    "prompt": [2e-1, 5e-1, 1.0, 2.0],
    "adapter": [2e-3, 3e-3, 5e-3],
}


def run_one(args: argparse.Namespace) -> dict[str, Any]:
    """One run in this process."""
    from rich.console import Console

    import spectune
    from spectune.methods import method_from_name
    from spectune.training import environment

    model, tokenizer = spectune.load(args.base, device="auto", dtype=args.dtype)
    config = spectune.TrainingConfig(
        learning_rate=args.rate,
        num_train_epochs=1,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=64 // args.batch,
        per_device_eval_batch_size=128,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        weight_decay=0.0,
        max_grad_norm=1.0,
        separator="\n",
        seed=args.seed,
    )
    result = spectune.train(
        model,
        tokenizer,
        method_from_name(args.method),
        args.data / "train.jsonl",
        args.data / "valid.jsonl",
        config,
        console=Console(quiet=True),
    )
    return {**result.model_dump(mode="json"), "dtype": args.dtype, "environment": environment()}


def run_all(args: argparse.Namespace) -> None:
    """Every cell of the grid, some at a time; lines are appended as they come, so that nothing is lost."""
    methods = args.methods.split(",") if args.methods else list(GRID)
    jobs = [(method, rate) for method in methods for rate in GRID[method]]

    def one(job: tuple[str, float]) -> None:
        method, rate = job
        begin = time.time()
        command = [sys.executable, __file__, "--base", str(args.base), "--data", str(args.data)]
        command += ["--method", method, "--rate", str(rate), "--dtype", args.dtype, "--max-steps", str(args.max_steps)]
        command += ["--batch", str(args.batch)]
        done = subprocess.run([*command, "--seed", str(args.seed)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(f"{method} {rate:g} failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            return
        line = done.stdout.strip().splitlines()[-1]
        with args.out.open("a") as file:
            file.write(line + "\n")
        found = json.loads(line)
        print(f"{method} {rate:g}: {found['valid_loss']:.4f} ({time.time() - begin:.0f} s)", flush=True)

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(one, jobs))


def table(results: list[dict[str, Any]]) -> str:
    """The page, from result lines alone."""
    environment = results[0]["environment"]
    base = results[0]["base_valid_loss"]
    lines = [
        "# E2E from gpt2-27m",
        "",
        "Mean loss in nats per target token on `valid.jsonl` (4,672 rows) after the last step of one epoch of "
        "`train.jsonl` (42,061 rows): batch 64, AdamW without weight decay, 6% warm-up then linear to zero, clipping "
        "at 1.0, sequence = prompt, newline, completion, EOS, loss on completion and EOS only. One seed. "
        f"The bare base is at {base:.3f} (reference {BARE}).",
        "",
        "Best of the learning rates tried. The reference column is PEFT 0.21 with transformers 5.17 on the same recipe "
        "at its best of two or three learning rates, measured before this project began.",
        "",
        "| method | trained weights | loss | learning rate | reference | difference |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method in GRID:
        mine = [r for r in results if r["method"] == method]
        if not mine:
            continue
        best = min(mine, key=lambda r: r["valid_loss"])
        reference, how = PEFT.get(method, (None, "PEFT has none"))
        beside = how if reference is None else f"{reference:.3f} ({how})"
        apart = "" if reference is None else f"{best['valid_loss'] - reference:+.3f}"
        lines.append(
            f"| {method} | {best['trainable_parameters']:,} | {best['valid_loss']:.4f} | {best['learning_rate']:g} | "
            f"{beside} | {apart} |"
        )
    lines += ["", "All runs:", "", "| method | learning rate | loss | training loss |", "|---|---:|---:|---:|"]
    for r in sorted(results, key=lambda r: (list(GRID).index(r["method"]), r["learning_rate"])):
        lines.append(f"| {r['method']} | {r['learning_rate']:g} | {r['valid_loss']:.4f} | {r['train_loss']:.4f} |")
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    lines += [
        "",
        f"Measured on {environment['device']}, {results[0]['dtype']}, {versions}, spectune {environment['spectune']}.",
        "Made by `python benchmarks/e2e_reference.py --base BASES/gpt2-27m --data DATA/e2e --out "
        "docs/results/e2e_reference.jsonl`, the "
        "page by the same with `--table docs/results/e2e_reference.md`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/results/e2e_reference.jsonl"))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--methods")
    parser.add_argument("--method")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=64, help="rows at a time; a step has 64 in any case")
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.table:
        args.table.write_text(table([json.loads(line) for line in args.out.read_text().splitlines()]))
    elif args.method:
        print(json.dumps(run_one(args)))
    else:
        run_all(args)


if __name__ == "__main__":
    main()
