"""The claims of the fine-tuning textbook, each beside what was measured: docs/claims.md, from result files alone.

    python benchmarks/claims.py --comparison docs/results/embedded.json --out docs/claims.md

Shares and memory of known shapes come from the planner; memory on a GPU from docs/results/plan.jsonl; quality on E2E,
TREC and instructions from docs/results/logs; the rest from a comparison's JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comparisons import read_log
from transformers import GPT2Config

from spectune.methods import BY_NAME, LoRA
from spectune.planning import REFERENCE_SHAPES, count, plan

RESULTS = Path("docs/results")
#: 96 layers of width 12,288: GPT-3 (Brown et al. 2020, table 2.1)
GPT3 = GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048)
TB, GIB = 1e12, 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparison", type=Path, default=RESULTS / "embedded.json")
    parser.add_argument("--out", type=Path, default=Path("docs/claims.md"))
    args = parser.parse_args()
    found = json.loads(args.comparison.read_text())
    lines = [
        "# The textbook's claims, measured",
        "",
        "Each row has the claim as people repeat it, what was measured here, and what that makes of the claim. The "
        "bases are small (5M and 27M weights): what is said of large ones is left open where size is the point. Made "
        "by `python benchmarks/claims.py`; sources: [embedded](results/embedded.md) (spectune-tiny, CPU, three seeds), "
        "[E2E](results/e2e.md), [TREC](results/trec.md) and [instructions](results/instruct_rasbt.md) (gpt2-27m), "
        "[plan](results/plan.md) (memory on an H200), and the planner's counts.",
        "",
        "| claim | measured | verdict |",
        "|---|---|---|",
    ]
    for claim in CLAIMS:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in claim(found)) + " |")
    args.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


def shares(name: str) -> list[float]:
    """Shares of the weights of GPT-2 124M and Llama-3-8B, with a method's defaults."""
    return [count(config, BY_NAME[name]()).share for config in REFERENCE_SHAPES.values()]


def share_claim(label: str, name: str, low: float, high: float) -> Callable[[dict[str, Any]], tuple[str, str, str]]:
    def claim(_: dict[str, Any]) -> tuple[str, str, str]:
        values = shares(name)
        inside = [low <= value <= high for value in values]
        text = ", ".join(f"{100 * v:.3g}% of {shape}" for v, shape in zip(values, REFERENCE_SHAPES, strict=True))
        verdict = "holds" if all(inside) else "outside on both" if not any(inside) else "holds on one, not on the other"
        text += "" if name != "lora" else f" (r={LoRA().r} on all linears)"
        wanted = f"{100 * low:g}%" if low == high else f"{100 * low:g} to {100 * high:g}%"
        if name == "bitfit":
            verdict = "of that order on GPT-2; less on a base without biases, where offsets are trained"
        return f"{label} train{'s' if name in ('lora', 'bitfit') else ''} {wanted} of the weights", text, verdict

    return claim


def fewer_weights(_: dict[str, Any]) -> tuple[str, str, str]:
    parts = []
    for task, metric in (("e2e", "bleu"), ("trec", "accuracy"), ("instruct_rasbt", "rouge_l")):
        runs = logged(task)
        full, lora = runs["Full"]["runs"], runs["LoRA"]["runs"]
        parts.append(
            f"{task}: loss {mean(full, 'loss'):.3g} and {mean(lora, 'loss'):.3g}, {metric} {mean(full, metric):.3g} "
            f"and {mean(lora, metric):.3g} (SD over seeds {spread(full, metric):.2g}, {spread(lora, metric):.2g})"
        )
    return (
        "PEFT matches full fine-tuning with 100x fewer weights",
        f"full fine-tuning and LoRA (3.4% of gpt2-27m, 30x fewer): {'; '.join(parts)}",
        "in the metrics of written text and in accuracy within the spread of seeds, with 30x fewer; in loss not on E2E "
        "and instructions. Methods with 100x fewer (prefix, BitFit, prompt) do not match",
    )


def forgetting(found: dict[str, Any]) -> tuple[str, str, str]:
    verdict = found["verdict"]["forgetting"]
    means = {arm["name"]: arm for arm in verdict["arms"]}
    text = ", ".join(
        f"{arm['label']} {arm['mean']:.2f} ({arm['low']:.2f} to {arm['high']:.2f})" for arm in means.values()
    )
    versus = verdict["versus_full"]
    better = sorted(means[name]["label"] for name, word in versus.items() if word == "better")
    worse = sorted(means[name]["label"] for name, word in versus.items() if word == "worse")
    same = sorted(means[name]["label"] for name, word in versus.items() if word == "no difference")
    said = []
    for word, names in (("forget less than full", better), ("more", worse), ("no difference found", same)):
        said += [f"{word}: {', '.join(names)}"] if names else []
    return (
        "Adapters (and PEFT) forget less",
        f"KL from the base on its own text, nats per token. Embedded task: {text}. "
        + ". ".join(f"{task}: {logged_forgetting(task)}" for task in ("trec", "instruct_rasbt")),
        f"not in general. Embedded task: {'; '.join(said)}. Each at the rate that was best for its loss: forgetting "
        "goes with rates as much as with methods",
    )


def least_data(found: dict[str, Any]) -> tuple[str, str, str]:
    table = curve(found)
    fewest, most = min(table["full"]), max(table["full"])
    base = found["base"]["valid_loss"]
    gains = {
        name: (base - points[fewest][0]) / (base - points[most][0]) for name, points in table.items() if most in points
    }
    ranked = sorted(gains, key=lambda name: -gains[name])
    best = min(table, key=lambda name: table[name][fewest][0])
    return (
        "Prompt tuning needs the least data",
        f"share of its own gain on {most:,} rows that a method has with {fewest}: "
        + ", ".join(f"{name} {100 * gains[name]:.0f}%" for name in ranked)
        + f"; lowest loss with {fewest} rows: {best} ({table[best][fewest][0]:.2f}; prompt "
        f"{table['prompt'][fewest][0]:.2f})",
        ("holds as a share of its own gain" if ranked[0] == "prompt" else "does not hold")
        + ("; its loss is not the lowest with few rows either" if best != "prompt" else ""),
    )


def overfits(found: dict[str, Any]) -> tuple[str, str, str]:
    points = curve(found)["full"]
    text = ", ".join(
        f"{rows:,} rows: best {best:.3f}, last {last:.3f}" for rows, (best, last) in sorted(points.items())
    )
    others = curve(found)
    fewest = min(points)
    worse = [name for name in others if others[name][fewest][0] < points[fewest][0] and name != "full"]
    rises = [rows for rows, (best, last) in points.items() if last > 1.02 * best]
    return (
        "Full fine-tuning overfits below thousands of rows",
        f"validation loss, the best of five looks and the last (at most 20 passes): {text}",
        (
            f"the last loss is more than 2% above the best with {', '.join(map(str, sorted(rises)))} rows"
            if rises
            else "not seen"
        )
        + f"; with {fewest} rows, the best weights kept, "
        + (f"{', '.join(worse)} are better" if worse else "no other method is better")
        + ". Only up to 1,200 rows: the curve on E2E up to 42,061 was lost",
    )


def prefix_overhead(found: dict[str, Any]) -> tuple[str, str, str]:
    parts = []
    for batch in ("1", "16"):
        run = next(r for r in found["runs"] if r["name"] == "prefix" and r.get("decode"))
        at = run["decode"][batch]
        low, high = at["overhead_range"]
        parts.append(
            f"batch {batch}: {100 * at['overhead']:+.0f}% (middle half {100 * low:+.0f} to {100 * high:+.0f}%)"
        )
    return (
        "Prefix tuning has no inference overhead",
        f"time for each decoded token against the bare base, CPU, 5M base: {'; '.join(parts)}",
        "does not hold here: it has no matrix products of its own, but longer attention and its own mask in each layer",
    )


def speed(found: dict[str, Any]) -> tuple[str, str, str]:
    rates: dict[str, list[float]] = {}
    for run in found["runs"]:
        rates.setdefault(run["name"], []).append(run["train_tokens_per_second"])
    middle = {name: statistics.median(values) for name, values in rates.items()}
    ranked = sorted(middle, key=lambda name: -middle[name])
    return (
        "Training speed: BitFit and prompt fastest, then prefix, LoRA, adapters, full slowest",
        "tokens per second against full: "
        + ", ".join(f"{name} {middle[name] / middle['full']:.2f}x" for name in ranked)
        + f" (CPU, {found['base']['name']}, one run each, one after another)",
        f"full is {'the slowest' if ranked[-1] == 'full' else 'not the slowest (' + ranked[-1] + ' is)'}; prompt "
        "tuning pays for its virtual tokens in every layer, DoRA for its norms; at 5M weights overhead rules",
    )


def storage(found: dict[str, Any]) -> tuple[str, str, str]:
    sizes = {run["name"]: run["stored_bytes"] for run in found["runs"]}
    return (
        "Ten tasks cost ten models with full fine-tuning, a few per cent of one with PEFT",
        ", ".join(f"{name} {10 * size / 1e6:.3g} MB" for name, size in sorted(sizes.items(), key=lambda i: -i[1])),
        "holds",
    )


def three_times(_: dict[str, Any]) -> tuple[str, str, str]:
    cells = [json.loads(line) for line in (RESULTS / "plan.jsonl").read_text().splitlines()]
    parts = []
    for cell in cells:
        if cell["method"] == "full" and "measured" in cell and not cell["padded"]:
            terms = cell["predicted"]
            states = (terms["weights"] + terms["gradients"] + terms["optimizer"]) / terms["weights"]
            whole = cell["measured"]["allocated"] / terms["weights"]
            ck = ", checkpointed" if cell["checkpointing"] else ""
            parts.append((cell["shape"], f"{cell['rows']} x {cell['length']}{ck}: {whole:.0f}x", states))
    shapes = dict.fromkeys(shape for shape, _, _ in parts)
    text = "; ".join(
        f"{shape}: states {next(s for name, _, s in parts if name == shape):.1f}x, measured peak "
        + ", ".join(what for name, what, _ in parts if name == shape)
        for shape in shapes
    )
    return (
        "Full fine-tuning needs 3x the model's memory",
        f"of the bf16 weights, with float32 masters and Adam: {text}",
        f"too low: weights, gradients (bf16, and float32 for the step), masters and two moments are "
        f"{min(s for _, _, s in parts):.0f} times the bf16 weights before any activation",
    )


def gpt3(_: dict[str, Any]) -> tuple[str, str, str]:
    estimate = plan(GPT3, "full", batch=1, length=2048, dtype="bfloat16", gradient_checkpointing=True)
    weights = estimate.total_parameters
    states = estimate.weights + estimate.gradients + estimate.optimizer
    return (
        "175B needs 1.4 TB",
        f"{weights / 1e9:.0f}B weights: 8 bytes each are {8 * weights / TB:.2f} TB; the planner's weights, gradients, "
        f"float32 masters and Adam's moments {states / TB:.2f} TB ({states / weights:.0f} bytes a weight), its peak "
        f"with one row of 2,048 tokens, checkpointed, {estimate.peak_allocated / TB:.2f} TB",
        "1.4 TB is 8 bytes a weight: all in bf16, or Adam's moments alone. Mixed precision takes at least twice that "
        "(16 bytes; 20 here, where the step has its gradients in float32)",
    )


CLAIMS: list[Callable[[dict[str, Any]], tuple[str, str, str]]] = [
    share_claim("Adapters", "adapter", 0.01, 0.05),
    share_claim("Prefixes", "prefix", 0.001, 0.01),
    share_claim("Prompts", "prompt", 0.001, 0.01),
    share_claim("LoRA", "lora", 0.001, 0.01),
    share_claim("BitFit", "bitfit", 0.001, 0.001),
    fewer_weights,
    forgetting,
    least_data,
    overfits,
    prefix_overhead,
    speed,
    storage,
    three_times,
    gpt3,
]


def logged(task: str) -> dict[str, dict[str, Any]]:
    """What was printed of a task's runs, see `comparisons.read_log`."""
    return read_log(RESULTS / "logs" / f"{task}.txt")


def logged_forgetting(task: str) -> str:
    """What each method forgot, with its interval, from the same logs."""
    cells = {label: arm["forgetting"] for label, arm in logged(task).items() if "forgetting" in arm}
    return ", ".join(f"{label} {value:.2f} ± {half:.2f}" for label, (value, half) in cells.items())


def mean(runs: list[dict[str, float]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def spread(runs: list[dict[str, float]], key: str) -> float:
    return statistics.stdev(run[key] for run in runs)


def curve(found: dict[str, Any]) -> dict[str, dict[int, tuple[float, float]]]:
    """method -> rows -> (best, last validation loss), means over seeds."""
    table: dict[str, dict[int, tuple[float, float]]] = {}
    for name in dict.fromkeys(point["name"] for point in found["curves"]):
        mine = [point for point in found["curves"] if point["name"] == name]
        for rows in sorted({point["rows"] for point in mine}):
            at = [point for point in mine if point["rows"] == rows]
            best, last = (statistics.fmean(p[key] for p in at) for key in ("valid_loss", "last_valid_loss"))
            table.setdefault(name, {})[rows] = (best, last)
    return table


if __name__ == "__main__":
    main()
