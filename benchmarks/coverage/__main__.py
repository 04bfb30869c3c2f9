"""`python -m benchmarks.coverage`: every causal language model type of transformers with every method.

    OMP_NUM_THREADS=1 python -m benchmarks.coverage --jobs 2 --out coverage.jsonl --page docs/coverage.md

Results are appended to `--out`; a type and method that has one there (of the same versions) is not tried again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.coverage.bases import all_types
from benchmarks.coverage.checks import METHODS
from benchmarks.coverage.driver import read, run
from benchmarks.coverage.page import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--types", help="model types, separated by commas; default: all of the mapping")
    parser.add_argument("--methods", help=f"of {', '.join(METHODS)}; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, default=Path("coverage.jsonl"), help="results, one JSON object a line")
    parser.add_argument("--seconds", type=float, default=300, help="time limit for one type")
    parser.add_argument("--page", type=Path, help="write the page of all results in --out, docs/coverage.md")
    args = parser.parse_args()
    types = args.types.split(",") if args.types else all_types()
    methods = args.methods.split(",") if args.methods else list(METHODS)
    run(types, methods, args.jobs, args.out, args.seconds)
    if args.page is not None:
        write(read(args.out), args.page)


if __name__ == "__main__":
    main()
