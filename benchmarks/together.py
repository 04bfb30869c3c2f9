"""Runs that share passes, against the same runs one after another: time, memory, losses.

    PYTHONPATH=src python -m benchmarks.together --out together.jsonl                      on a CUDA device
    PYTHONPATH=src python -m benchmarks.together --out small.jsonl --device cpu --shapes "tiny gpt2" "tiny llama"
    PYTHONPATH=src python -m benchmarks.together --out together.jsonl --table docs/results/together.md

Eight unlike runs (methods, ranks, rates, seeds, rows) over one base with random weights, each with the same tokens a
step. A step's time is the wall's, from one step to the next of the second half of a run, with all that a run does
between steps; every setting is the default's, so that a run by itself has its CUDA graphs, unless `--eager`. Dropout is
off: a base that draws random numbers in a pass is not shared. One JSON line for each measurement, written at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.shapes import CONFIGS, build
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedModel

import spectune
from spectune.data import DataReport, Encoded, Example, Row
from spectune.deltas import Method, attached, detach
from spectune.methods import IA3, BitFit, BottleneckAdapter, DoRA, LoRA, PrefixTuning, PromptTuning
from spectune.results import RunResult
from spectune.storage import load_tokenizer
from spectune.training import Run, TrainingConfig, train, train_together
from spectune.training.display import Display
from spectune.training.observer import Observer
from spectune.training.starting import Asked

QUIET = Console(quiet=True)
SHAPES = ("GPT-2 124M", "Llama 1B")
#: unlike in method, size and rate
RUNS: tuple[tuple[Method, float], ...] = (
    (LoRA(r=8), 1e-3), (LoRA(r=32, lora_alpha=64), 3e-4), (DoRA(r=16), 5e-4),
    (BottleneckAdapter(bottleneck_dim=64, dropout=0.0), 1e-3), (PrefixTuning(num_virtual_tokens=20), 1e-2),
    (PromptTuning(num_virtual_tokens=20, init="random"), 1e-2), (BitFit(), 3e-3), (IA3(), 1e-2),
)  # fmt: skip
#: of which the published gain is: the same method everywhere
ALIKE: tuple[tuple[Method, float], ...] = tuple((LoRA(r=r), rate) for r in (8, 16) for rate in (1e-4, 3e-4, 1e-3, 3e-3))


PREFACE = """# Several runs in shared passes

`python -m benchmarks.together` on one H200 (torch 2.11, transformers 5.17): eight runs over a base with random
weights in bfloat16, "unlike" in method, size and rate (two LoRAs, DoRA, an adapter, prefix, prompt, BitFit, IA3),
each with two rows of 128 tokens a step. Milliseconds are of one step of all eight, the median of a run's second half,
with all that a run does between steps; every setting is the default's, so that a run by itself has its CUDA graphs.
Losses are means over a run of some twenty steps, in bfloat16.

"""


@dataclass
class Clock:
    """Stands in a display's place, and notes when each step was taken."""

    times: list[float] = field(default_factory=list)

    def display(self) -> Display:
        clock = self

        class Noting(Display):
            def step(self, loss: float, tokens_per_second: float) -> None:
                clock.times.append(time.perf_counter())

        return Noting(QUIET, "", 1, 0, says=False)

    def of_a_step(self, runs: int) -> float:
        """The median time between two steps of the second half, where `runs` take theirs in turn."""
        ends = self.times[runs - 1 :: runs]
        later = ends[len(ends) // 2 :]
        return statistics.median(b - a for a, b in itertools.pairwise(later))


def rows_of(seed: int, count: int, length: int, vocabulary: int) -> Encoded:
    """Random rows of one length; every token but the first is a target."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, min(vocabulary, 1024), (count, length), generator=generator).tolist()
    examples = [Example(row, 1, Row(origin=f"{seed}:{n}", text="")) for n, row in enumerate(ids)]
    return Encoded(examples, DataReport(rows=count, kept=count))


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


@dataclass
class Bench:
    """One base, and what is trained on it."""

    shape: str
    model: PreTrainedModel
    tokenizer: Any
    runs: Sequence[tuple[Method, float]]
    steps: int
    how: str
    size: tuple[int, int]

    def alone(self) -> list[dict[str, Any]]:
        """Each run by itself."""
        found = []
        for number, (method, _) in enumerate(self.runs):
            clock = Clock()
            self._reset()
            result = train(
                self.model, self.tokenizer, method, *self._rows(number), self._config(number), name=f"run-{number}",
                console=QUIET, observer=Observer(display=clock.display()),
            )  # fmt: skip
            found.append(self._line("alone", result, clock.of_a_step(1)))
            self._bare()
        return found

    def together(self) -> list[dict[str, Any]]:
        """All in shared passes; of each run a K-th of a step's time."""
        clock, count = Clock(), len(self.runs)
        runs = [Run(method, *self._rows(number)) for number, (method, _) in enumerate(self.runs)]
        asked = [Asked(self._config(number), f"run-{number}") for number in range(count)]
        self._reset()
        results = train_together(
            self.model, self.tokenizer, runs, asked=asked, console=QUIET, display=clock.display(), share_passes=True
        )
        seconds = clock.of_a_step(count) / count
        lines = [self._line("together", result, seconds) for result in results]
        self._bare()
        return lines

    def _rows(self, number: int) -> tuple[Encoded, Encoded]:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        rows, length = self.size
        return rows_of(number, 4 * rows, length, vocabulary), rows_of(100 + number, rows, length, vocabulary)

    def _config(self, number: int) -> TrainingConfig:
        settings: dict[str, Any] = {"eager": {"cuda_graphs": False}, "compiled": {"torch_compile": True}}.get(
            self.how, {}
        )
        return TrainingConfig(
            max_steps=self.steps, eval_steps=self.steps, per_device_train_batch_size=self.size[0], seed=number,
            learning_rate=self.runs[number][1], per_device_eval_batch_size=self.size[0], **settings,
        )  # fmt: skip

    def _line(self, how: str, result: RunResult, seconds: float) -> dict[str, Any]:
        peak = torch.cuda.max_memory_allocated() if self.model.device.type == "cuda" else None
        return {
            "shape": self.shape, "how": how, "method": result.method, "runs": len(self.runs), "setting": self.how,
            "rows": self.size[0], "length": self.size[1], "seconds": seconds, "train_loss": result.train_loss,
            "valid_loss": result.valid_loss, "peak_bytes": peak or result.peak_memory_bytes.get("train_allocated"),
            "base_bytes": sum(p.numel() * p.element_size() for p in self.model.parameters()),
            "predicted_bytes": result.predicted_memory_bytes.get("peak_allocated"),
            "trained_together": result.trained_together,
        }  # fmt: skip

    def _reset(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _bare(self) -> None:
        for name in list(attached(self.model)):
            detach(self.model, name)


def gain(lines: Sequence[dict[str, Any]]) -> float:
    """How many times as fast the runs are together."""
    alone, together = (sum(x["seconds"] for x in lines if x["how"] == how) for how in ("alone", "together"))
    return alone / together


def table(lines: Sequence[dict[str, Any]]) -> str:
    """One line for each base and set of runs."""
    found = [
        "| Base | Runs | One after another, ms | Together, ms | Gain | Peak alone, GiB | Peak together, GiB "
        "| Base, GiB | Largest difference of a loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((x["shape"], x["kind"], x["setting"]) for x in lines):
        of = [x for x in lines if (x["shape"], x["kind"], x["setting"]) == key]
        alone, together = ([x for x in of if x["how"] == how] for how in ("alone", "together"))
        if not alone or not together:
            continue
        apart = max(abs(a["train_loss"] - b["train_loss"]) for a, b in zip(alone, together, strict=True))
        peaks = [max(x["peak_bytes"] or 0 for x in part) / 2**30 for part in (alone, together)]
        times = [1000 * sum(x["seconds"] for x in part) for part in (alone, together)]
        found.append(
            f"| {key[0]} | {len(alone)} {key[1]}{key[2] and ', ' + key[2]} | {times[0]:.1f} | {times[1]:.1f} "
            f"| {gain(of):.2f} | {peaks[0]:.2f} | {peaks[1]:.2f} | {of[0]['base_bytes'] / 2**30:.2f} | {apart:.2g} |"
        )
    return "\n".join(found) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--rows", type=int, default=2, help="of a run and step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", default="", help="bfloat16 on CUDA, float32 on a CPU by default")
    parser.add_argument("--kinds", nargs="*", help="of runs: unlike, LoRA")
    parser.add_argument("--compiled", action="store_true", help="blocks are compiled, as they are in long runs")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs in a run by itself either")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start nothing new after so many")
    parser.add_argument("--table", type=Path, help="write the table from --out; measures nothing")
    args = parser.parse_args()
    if args.table:
        lines = [json.loads(x) for x in args.out.read_text().splitlines()]
        args.table.write_text(PREFACE + table(lines), encoding="utf-8")
        return
    begun, device = time.perf_counter(), torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    tokenizer = load_tokenizer("spectune-tiny")
    for shape in args.shapes:
        torch.manual_seed(0)
        model = build(without_dropout(CONFIGS[shape]()), device, dtype)
        model.config._name_or_path = shape
        for kind, runs in (("unlike", RUNS), ("LoRA", ALIKE)):
            if time.perf_counter() - begun > args.budget_seconds:
                return
            if args.kinds and kind not in args.kinds:
                continue
            how = "compiled" if args.compiled else "eager" if args.eager else ""
            bench = Bench(shape, model, tokenizer, runs, args.steps, how, (args.rows, args.length))
            lines = [{**line, "kind": kind} for line in (*bench.together(), *bench.alone())]
            with args.out.open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(line) + "\n" for line in lines)
            print(f"{shape}, {kind}: {gain(lines):.2f} times, spectune {spectune.__version__}", flush=True)
            print(table(lines), flush=True)
        del model, bench


if __name__ == "__main__":
    main()
