"""`python -m benchmarks.exports`: good exports pass, planted faults are caught.

    OMP_NUM_THREADS=1 PYTHONPATH=src python -m benchmarks.exports --out exports.jsonl --page docs/results/exports.md

Each type's base is written to a folder, and each method's delta on it is exported in each format that it has, and
proved; then the same folder with each fault that can be made of it. Lines are appended to `--out`; a type that has some
there is not tried again.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.coverage.bases import BaseFailsError
from benchmarks.exports.cases import METHODS, TYPES, attached, formats, save_base, write
from benchmarks.exports.faults import FAULTS

from spectune.deltas.difference import own_rounding
from spectune.errors import ConfigError, ExportError, SpectuneError
from spectune.storage import ExpectedAnswers, prove_export

Line = dict[str, Any]


def lines_of(model_type: str, methods: list[str]) -> Iterator[Line]:
    """What became of every export of a type."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        try:
            kind = save_base(model_type, root / "base")
        except (BaseFailsError, Exception) as error:
            yield {"type": model_type, "outcome": "no base", "why": f"{type(error).__name__}: {error}"[:200]}
            return
        for method in methods:
            try:
                wanted = list(formats(attached(kind, root / "base", METHODS[method])))
            except SpectuneError as error:
                yield {"type": model_type, "method": method, "outcome": "not attached", "why": str(error)[:200]}
                continue
            for format_ in wanted:
                case = {"type": model_type, "method": method, "format": format_}
                yield from (case | line for line in _of_one(kind, root, method, format_))


def _of_one(kind: Any, root: Path, method: str, format_: str) -> Iterator[Line]:
    base, good, bad = root / "base", root / "good", root / "bad"
    shutil.rmtree(good, ignore_errors=True)
    delta = attached(kind, base, METHODS[method])
    try:
        expected = write(delta, format_, good)
    except ConfigError as error:
        yield {"outcome": "not offered", "why": str(error)[:200]}
        return

    def rounding() -> float | None:
        return own_rounding(delta.model, delta.name, [batch["input_ids"][0] for batch in expected.batches])

    yield _proved(good, expected, rounding)
    for fault in FAULTS[format_]:
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        if fault(bad, base):
            yield {"fault": fault.__name__} | _proved(bad, expected, rounding)


def _proved(folder: Path, expected: ExpectedAnswers, rounding: Any) -> Line:
    try:
        proof = prove_export(folder, expected, own_rounding=rounding)
    except ExportError as error:
        return {"outcome": "refused", "nothing": "does nothing" in str(error), "why": str(error)[:400]}
    relative = proof.largest / proof.largest_logit
    return {"outcome": "passed", "relative": relative, "mean": proof.mean, "effect": proof.mean_effect}


def page(lines: list[Line]) -> str:
    """docs/results/exports.md."""
    good = [line for line in lines if "fault" not in line and line["outcome"] in ("passed", "refused")]
    planted = [line for line in lines if "fault" in line]
    caught = [line for line in planted if line["outcome"] == "refused"]
    passed = [line for line in good if line["outcome"] == "passed"]
    types = sorted({line["type"] for line in good})
    text = f"""# Exports proved

Made by `python -m benchmarks.exports` (see `--help`), on a CPU, float32; torch {torch.__version__}, transformers
{version("transformers")}, peft {version("peft")}. Tiny bases of {len(types)} types with random weights, deltas with
random weights, three rows. Each export is run as `spectune export` runs it: PEFT's folders by PEFT, merged models and
prompt embeddings by transformers alone.

**{len(passed)} of {len(good)} good exports pass. {len(caught)} of {len(planted)} planted faults are caught.**

| format | method | good exports passed | faults caught |
|---|---|---|---|
"""
    for format_, method in sorted({(line["format"], line["method"]) for line in good}):
        own = [line for line in good if (line["format"], line["method"]) == (format_, method)]
        bad = [line for line in planted if (line["format"], line["method"]) == (format_, method)]
        right = sum(line["outcome"] == "passed" for line in own)
        found = sum(line["outcome"] == "refused" for line in bad)
        text += f"| {format_} | {method} | {right} of {len(own)} | {found} of {len(bad)} |\n"
    text += "\n| fault | caught | of them as doing nothing |\n|---|---|---|\n"
    counts, totals = Counter(line["fault"] for line in caught), Counter(line["fault"] for line in planted)
    nothing = Counter(line["fault"] for line in caught if line["nothing"])
    for fault in totals:
        text += f"| {fault.replace('_', ' ')} | {counts[fault]} of {totals[fault]} | {nothing[fault]} |\n"
    worst = max((line["relative"] for line in passed), default=0.0)
    text += f"\nOf the good exports the largest logit difference is at most {worst:.1e} of the largest logit.\n"
    refused_good = [line for line in good if line["outcome"] == "refused"]
    for line in refused_good + [line for line in planted if line["outcome"] == "passed"]:
        what = ", ".join((line["type"], line["method"], line["format"], line.get("fault", "good")))
        text += f"\n- {what}: {line['outcome']}"
    refused = Counter(f"{line['method']}, {line['outcome']}" for line in lines if line["outcome"].startswith("not "))
    if refused:
        text += "\nNot exported, as attach or merge refuse them by name: "
        text += "; ".join(f"{what} ({count} types)" for what, count in sorted(refused.items())) + ".\n"
    return text + f"\nTypes: {', '.join(types)}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--types", default=",".join(TYPES), help="model types, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("exports.jsonl"), help="results, one JSON object a line")
    parser.add_argument("--page", type=Path, help="write the page of all results in --out")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    done = {json.loads(line)["type"] for line in args.out.read_text().splitlines()} if args.out.exists() else set()
    for model_type in (name for name in args.types.split(",") if name not in done):
        found = list(lines_of(model_type, args.methods.split(",")))
        with args.out.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in found)
        print(model_type, dict(Counter(line["outcome"] + (" fault" if "fault" in line else "") for line in found)))
    if args.page is not None:
        args.page.write_text(page([json.loads(line) for line in args.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
