"""Heads beside label words on TREC's six classes, and a regression on texts made here; docs/results/heads.md has the
results.

    python -m benchmarks.heads --base shared/bases/gpt2-27m --trec shared/data/trec --out out/heads

writes `trec/` and `regression/`, two comparisons with their pages, and `heads.json`, what both found. The regression's
texts are counted things ("two kites, seven cups and one lamp"), and the label is their number, divided by ten: a
quantity that stands in no single word. They are drawn with a seed.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from spectune import Arm, BitFit, FullFineTuning, LoRA, TrainingConfig, compare
from spectune.comparing import Comparison

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
THINGS = ["kite", "cup", "lamp", "stone", "boat", "drum", "coat", "shell", "bell", "rope"]
OPENINGS = ("On the table lie", "We counted", "She packed", "In the shed there are")


def counted_things(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of `text` and `label`, the number of things in tenths; no text twice."""
    rng, rows = random.Random(seed), dict[str, float]()
    while len(rows) < count:
        numbers = [rng.randint(1, 9) for _ in range(rng.randint(1, 4))]
        parts = [
            f"{NUMBERS[number - 1]} {thing}{'s' if number > 1 else ''}"
            for number, thing in zip(numbers, rng.sample(THINGS, len(numbers)), strict=True)
        ]
        listed = " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
        rows[f"{rng.choice(OPENINGS)} {listed}."] = sum(numbers) / 10
    return [{"text": text, "label": label} for text, label in rows.items()]


def trec(base: str, data: Path, out: Path, steps: int, preset: str) -> Comparison:
    """The six classes as words that are written, and as classes of a head, on the same rows, decided by accuracy."""
    methods = {
        "LoRA, words": LoRA(), "LoRA, head": Arm("", LoRA(), task_type="SEQ_CLS"),
        "BitFit, words": BitFit(), "BitFit, head": Arm("", BitFit(), task_type="SEQ_CLS"),
        "Full, head": Arm("", FullFineTuning(), task_type="SEQ_CLS"),
    }  # fmt: skip
    config = TrainingConfig(max_steps=steps, per_device_train_batch_size=32, separator="\n", max_length=128)
    rows = [str(data / f"{part}.jsonl") for part in ("train", "valid", "test")]
    return compare(base, *rows[:2], test_rows=rows[2], methods=methods, config=config, preset=preset, output_dir=out)


def regression(base: str, out: Path, steps: int, preset: str) -> Comparison:
    rows = counted_things(2_400, seed=0)
    config = TrainingConfig(max_steps=steps, per_device_train_batch_size=32)
    parts = rows[:2_000], rows[2_000:2_200]
    methods = [FullFineTuning(), LoRA(), BitFit()]
    return compare(base, *parts, test_rows=rows[2_200:], methods=methods, config=config, preset=preset, output_dir=out)


def found(comparison: Comparison) -> dict[str, Any]:
    """What a comparison found, for a table."""
    verdict = comparison.content["verdict"]
    judged = {"decided_by": comparison.result.data.decided_by, "sentences": verdict["sentences"], "arms": {}}
    for run in comparison.runs:
        arm = judged["arms"].setdefault(
            run["label"], {"seeds": 0, "metrics": {}, "trained": run["trainable_parameters"]}
        )
        arm["seeds"] += 1
        for name, value in {**run["metrics"], "judged_loss": run["judged_loss"]}.items():
            arm["metrics"].setdefault(name, []).append(value)
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--trec", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--preset", default="default")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    results = {
        "trec": found(trec(given.base, given.trec, given.out / "trec", given.steps, given.preset)),
        "regression": found(regression(given.base, given.out / "regression", given.steps, given.preset)),
    }
    (given.out / "heads.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
