"""The commands of `python -m benchmarks.rates`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

#: hidden sizes of the bases, from which the first rate of a sweep follows
BASES = {"spectune-tiny": 224, "gpt2-27m": 448, "gpt2-60m": 640, "llama-120m": 896, "tiny-test": 64}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates")
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="the folder that the other commands need")
    for name in ("--corpus", "--base", "--data", "--out"):
        packing.add_argument(name, type=Path, required=True)
    packing.add_argument("--tokens", type=int, default=8_000_000)
    making = commands.add_parser("pretrain", help="a base from the corpus, in a given time")
    making.add_argument("--shape", required=True)
    making.add_argument("--windows", type=int, default=64, help="of 512 tokens, a step")
    sweeping = commands.add_parser("sweep", help="the best rate of every method on every base")
    sweeping.add_argument("--bases", default="gpt2-60m,llama-120m,gpt2-27m,spectune-tiny")
    sweeping.add_argument("--methods", default="lora,full,adapter,prefix,prompt,bitfit,ia3,dora")
    sweeping.add_argument("--steps", type=int, default=150)
    sweeping.add_argument("--batch", type=int, default=64)
    sweeping.add_argument("--workers", type=int, default=8)
    sweeping.add_argument("--threads", type=int, default=1)
    paging = commands.add_parser("page", help="docs/results/rates.md from the results")
    paging.add_argument("--results", type=Path, default=Path("docs/results/rates.jsonl"))
    for command in (making, sweeping):
        command.add_argument("--material", type=Path, required=True)
        command.add_argument("--made", type=Path, required=True, help="folder of the bases that were made")
        command.add_argument("--seconds", type=float, required=True)
        command.add_argument("--out", type=Path, required=True, help="results, JSON lines")
    return parser


def main() -> None:
    """Run one command."""
    given = _parser().parse_args()
    if given.command == "pack":
        from benchmarks.rates.material import pack

        pack(given.corpus, given.base, given.data, given.out, given.tokens)
    elif given.command == "pretrain":
        from benchmarks.rates.pretrain import pretrain

        record = pretrain(given.material, given.shape, given.seconds, given.windows, given.made)
        print(record, flush=True)
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    elif given.command == "sweep":
        _sweep(given)
    elif given.command == "page":
        from benchmarks.rates.page import write_page

        write_page(given.results)


def _sweep(given: argparse.Namespace) -> None:
    from benchmarks.rates.material import unpack_base
    from benchmarks.rates.sweep import Arm, Setting, resumed, sweep

    from spectune.methods import BY_NAME

    bases, methods = given.bases.split(","), given.methods.split(",")
    folders = {base: str(given.made / base) for base in bases}
    if "gpt2-27m" in bases:
        folders["gpt2-27m"] = str(unpack_base(given.material, given.made))
    if "spectune-tiny" in bases:
        folders["spectune-tiny"] = "spectune-tiny"
    arms = (Arm(b, m, BY_NAME[m].learning_rates.at(BASES[b]).rate) for m in methods for b in bases)
    setting = Setting(given.material, folders, given.steps, given.batch, given.threads)
    sweep(resumed(arms, given.out, given.steps), setting, given.out, given.workers, given.seconds)


if __name__ == "__main__":
    main()
