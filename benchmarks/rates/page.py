"""docs/results/rates.md from the results: on every base the best rate of the grid and the default by rule, and the
published points that the rules go through."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rates.sweep import records

from spectune.methods import BY_NAME, METHODS, FullFineTuning, LoRA

PAGE = Path("docs/results/rates.md")
HIDDEN = {"spectune-tiny": 224, "gpt2-27m": 448}
#: best LoRA rates of Tinker's cookbook (tulu3, batch 128, 780 steps, rates 3 apart): base, hidden size, rate
PUBLISHED = (
    ("Llama-3.2-1B", 2048, 1e-3), ("Qwen3-30B-A3B", 2048, 1e-3), ("Qwen3-4B", 2560, 1e-3),
    ("gpt-oss-20b", 2880, 1e-4), ("gpt-oss-120b", 2880, 3e-4),
    ("Llama-3.2-3B", 3072, 1e-3), ("Llama-3.1-8B", 4096, 3e-4), ("Qwen3-8B", 4096, 1e-3),
    ("Qwen3-235B-A22B", 4096, 3e-4), ("Qwen3-32B", 5120, 3e-4),
    ("DeepSeek-V3.1", 7168, 4e-4), ("Kimi-K2", 7168, 3e-4), ("Llama-3.1-70B", 8192, 3e-4),
)  # fmt: skip
INTRODUCTION = """# Learning rates by size of the base

Made by `python -m benchmarks.rates page` from rates.jsonl (see `benchmarks/rates/__init__.py` for the commands).

A method's default learning rate is a function of the base's hidden size: through the points below, by a power law
between two of them, and level outside (`spectune.deltas.rate_rule`; the points of a method stand in its own file in
`src/spectune/methods`). A search looks a factor 10 to either side, 30 where the evidence is weak, and goes on where the
best lies on an edge. Of one size, families differ by 3 and tasks by up to 6: no rule can tell that, a search can.
"""


def write_page(results: Path) -> None:
    """Write docs/results/rates.md."""
    found = records(results)
    parts = [INTRODUCTION, *_bases(found), *_sweeps(found), *_searches(), *_published(), *_weak()]
    PAGE.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _bases(found: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        (r["base"], f"{r['parameters'] / 1e6:.0f}M", r["hidden"], f"{r['tokens'] / 1e6:.0f}M", f"{r['seconds']:.0f}",
         f"{r['valid_loss']:.2f}")
        for r in found if r["kind"] == "pretrain"
    ]  # fmt: skip
    header = ("Base", "Weights", "Hidden size", "Tokens seen", "Seconds", "Held-out loss")
    words = (
        "Made on one H200 from 10M tokens of an English corpus, with the tokenizer of gpt2-27m. They are small and "
        "little trained; what is asked of them is where the best rate lies as bases grow.\n"
    )
    return ["## Two bases made for this\n", words, *_table(header, rows)] if rows else []


def _sweeps(found: Sequence[dict[str, Any]]) -> list[str]:
    runs = [r for r in found if r["kind"] == "run"]
    hidden = {"spectune-tiny": 224, "gpt2-27m": 448} | {
        r["base"]: r["hidden"] for r in found if r["kind"] == "pretrain"
    }
    rows = []
    for name in BY_NAME:
        for base in sorted({r["base"] for r in runs}, key=lambda base: hidden[base]):
            mine = [r for r in runs if (r["base"], r["method"]) == (base, name)]
            if mine:
                rows.append(_row(name, base, hidden[base], mine))
    steps = sorted({(r["steps"], r["batch"]) for r in runs})
    words = (
        f"{len(runs)} runs of `spectune.train` on E2E, "
        + ", ".join(f"{count} steps of {batch} rows" for count, batch in steps)
        + ", bfloat16 bases, 200 validation rows, one seed; rates are three apart, and 1.7 around the best. The loss "
        "of the default is read off the line through the two rates beside it; gain is what training takes off the bare "
        "base's loss. The rules' points were set to these runs: the table shows that one rule serves all of them, not "
        "that it holds on other bases. gpt2-27m had its weights rounded to eight bits a row (held-out loss 0.001 "
        "higher so). DoRA has LoRA's rule and was not swept; OFT, MiSS and LN tuning were, on two of the bases.\n"
    )
    header = ("Method", "Base", "Hidden size", "Rates tried", "Best", "Default", "Default / best", "Gain reached",
              "Rates within 2% of the gain")  # fmt: skip
    return ["## The sweeps\n", words, *_table(header, rows)]


def _row(name: str, base: str, hidden: int, runs: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    default = BY_NAME[name].learning_rates.at(hidden).rate
    ended = sorted((r["rate"], r["valid_loss"]) for r in runs if r["valid_loss"] is not None)
    best, lowest = min(ended, key=lambda run: run[1])
    gain = next(r["base_loss"] for r in runs if r["base_loss"] is not None) - lowest
    at_default = loss_between(ended, default)
    near = [rate for rate, loss in ended if loss <= lowest + 0.02 * gain]
    reached = "-" if at_default is None else f"{100 * (1 - (at_default - lowest) / gain):.1f}%"
    edge = " (edge)" if best in (ended[0][0], max(r["rate"] for r in runs)) else ""
    tried = f"{len(runs)}, {min(r['rate'] for r in runs):.2g} to {max(r['rate'] for r in runs):.2g}"
    return (
        BY_NAME[name].label, base, hidden, tried, f"{best:.2g}{edge}", f"{default:.2g}", f"{default / best:.2f}",
        reached, f"{min(near):.2g} to {max(near):.2g}",
    )  # fmt: skip


def loss_between(ended: Sequence[tuple[float, float]], rate: float) -> float | None:
    """The loss at a rate, on the line between its neighbours over the logarithm; None outside of what was tried."""
    for rate_known, loss in ended:
        if math.isclose(rate_known, rate, rel_tol=0.03):
            return loss
    below = [run for run in ended if run[0] < rate]
    above = [run for run in ended if run[0] > rate]
    if not below or not above:
        return None
    (low, low_loss), (high, high_loss) = below[-1], above[0]
    return low_loss + (high_loss - low_loss) * math.log(rate / low) / math.log(high / low)


def _searches() -> list[str]:
    """Best rates that earlier comparisons found by successive halving, on other tasks."""
    files = [(name, PAGE.parent / f"{name}.json") for name in ("embedded", "e2e", "trec", "instruct_rasbt")]
    contents = [(name, json.loads(file.read_text(encoding="utf-8"))) for name, file in files]
    rows = []
    searched = {name for _, content in contents for name in content["searches"]}
    for name, method in BY_NAME.items():
        if name not in searched:  # younger than these comparisons
            continue
        cells = [method.label]
        for _, content in contents:
            default = method.learning_rates.at(HIDDEN[content["base"]["name"]]).rate
            best = content["searches"][name]["best"]
            cells.append(f"{best:.2g} ({default / best:.2f})")
        rows.append(cells)
    header = ("Method", *(f"{name} on {content['base']['name']}" for name, content in contents))
    words = "The best rate of each search in docs/results, and in brackets the default as a multiple of it.\n"
    return ["## Other tasks\n", words, *_table(header, rows)]


def _published() -> list[str]:
    rows = []
    for base, hidden, best in PUBLISHED:
        lora, full = (method.learning_rates.at(hidden).rate for method in (LoRA, FullFineTuning))
        rows.append((base, hidden, f"{best:g}", f"{lora:.2g}", f"{lora / best:.2f}", f"{full:.2g}"))
    words = (
        "Best LoRA rates of Tinker's cookbook (supervised, tulu3, batch 128, 780 steps, rates about 3 apart), which "
        "says that full fine-tuning wants a tenth. 3e-3 diverged on each base that was looked at from 1B to 9B. Not "
        "here, since their sizes were not looked up: Qwen3.5-4B, -27B, -35B-A3B and -397B-A17B (3e-4), "
        "Nemotron-3-Nano-30B-A3B (4e-4) and -Super-120B-A12B (1e-3).\n"
    )
    header = ("Base", "Hidden size", "Published best", "LoRA's default", "Default / best", "Full's default")
    return ["## Published: LoRA and full fine-tuning\n", words, *_table(header, rows)]


def _weak() -> list[str]:
    rows = []
    for method in METHODS:
        rows += [
            (method.label, p.hidden, f"{p.rate:g}", p.source) for p in method.learning_rates.points if not p.strong
        ]
    words = "What papers and tools set, without a search that was published: weak evidence for wide bases.\n"
    return ["## Settings of papers\n", words, *_table(("Method", "Hidden size", "Rate", "Source"), rows)]


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [" | ".join(header), " | ".join("---" for _ in header), *(" | ".join(map(str, row)) for row in rows)]
    return [*(f"| {line} |" for line in lines), ""]
