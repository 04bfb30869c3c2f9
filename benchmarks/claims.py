"""The claims of the fine-tuning textbook, each beside what was measured: docs/claims.md, from result files alone.

    python benchmarks/claims.py --results docs/results --out docs/claims.md

Shares and memory of known shapes come from the planner, memory on a GPU from plan.jsonl, the rest from the comparisons'
JSON. Verdicts are worked out from the numbers; a point that was not measured is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GPT2Config
from verdicts import Versus, curve, grouped, listed, shares_of_weights, versus_full

from spectune.methods import BY_NAME, LoRA
from spectune.planning import REFERENCE_SHAPES, count, plan
from spectune.reporting import units

#: 96 layers of width 12,288: GPT-3 (Brown et al. 2020, table 2.1)
GPT3 = GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048)
TB = 1e12
#: the comparisons: file, what sentences call it, the metric that is looked at beside the loss
TASKS = {
    "embedded": ("the embedded task", "rouge_l"),
    "e2e": ("E2E", "bleu"),
    "trec": ("TREC", "accuracy"),
    "instruct_rasbt": ("instructions", "rouge_l"),
}
METRICS = {"rouge_l": "ROUGE-L", "bleu": "BLEU", "accuracy": "accuracy"}

Row = tuple[str, str, str]


@dataclass(frozen=True)
class Results:
    """The comparisons by task, and the cells of docs/results/plan.jsonl."""

    tasks: Mapping[str, Mapping[str, Any]]
    memory: list[Mapping[str, Any]]

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any], str]]:
        """(what a task is called, its comparison, its metric)."""
        for name, content in self.tasks.items():
            called, metric = TASKS[name]
            yield called, content, metric


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/claims.md"))
    args = parser.parse_args()
    found = Results(
        {name: json.loads((args.results / f"{name}.json").read_text(encoding="utf-8")) for name in TASKS},
        [json.loads(line) for line in (args.results / "plan.jsonl").read_text(encoding="utf-8").splitlines()],
    )
    lines = [
        "# The textbook's claims, measured",
        "",
        "Each row has the claim as people repeat it, what was measured here, and what that makes of the claim. The "
        "bases are small (5M and 27M weights): what is said of large ones is left open where size is the point. "
        'Differences are those that a test of three seeds a method finds, corrected for the number of pairs; "level" '
        "is no difference found, or better. Each method has the learning rate that was best for it. Made by "
        "`python benchmarks/claims.py`; sources: [embedded](results/embedded.md) (spectune-tiny, CPU), "
        "[E2E](results/e2e.md), [TREC](results/trec.md) and [instructions](results/instruct_rasbt.md) (gpt2-27m, "
        "H100), [plan](results/plan.md) (memory on an H200), and the planner's counts.",
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


def share_claim(label: str, name: str, low: float, high: float) -> Callable[[Results], Row]:
    def claim(_: Results) -> Row:
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


def fewer_weights(found: Results) -> Row:
    """Which methods are level with full fine-tuning, with how many weights."""
    parts = []
    # (has a hundredth of the weights or less, what was compared) -> method -> tasks on which it is level
    level: dict[tuple[bool, str], dict[str, list[str]]] = {}
    most = 0.0
    for called, content, metric in found:
        share, cells = shares_of_weights(content), []
        most = max(most, *(value for name, value in share.items() if name != "full"))
        for kind, name, part in (
            ("loss", "loss", content["verdict"]),
            ("metric", METRICS[metric], content["verdict"]["metrics"][metric]),
        ):
            arms = [arm for arm in versus_full(part).values() if arm.level]
            cells.append(f"{name} {listed([f'{arm.label} ({100 * share[arm.name]:.2g}%)' for arm in arms]) or 'none'}")
            for arm in arms:
                level.setdefault((share[arm.name] <= 0.01, kind), {}).setdefault(arm.label, []).append(called)
        parts.append(f"{_start(called)}: {'; '.join(cells)}")
    said = [
        f"with {words} fewer, level in loss {_tasks(level.get((few, 'loss'), {}))}, in what is written or chosen "
        f"{_tasks(level.get((few, 'metric'), {}))}"
        for words, few in (("100x", True), (f"{1 / most:.0f}x to 100x", False))
    ]
    widest = max(_left_open(content) for _, content, _ in found)
    return (
        "PEFT matches full fine-tuning with 100x fewer weights",
        f"level with full fine-tuning (share of its weights). {'. '.join(parts)}",
        f"{'holds in part' if level.get((True, 'loss')) else 'does not hold here'}: {'; '.join(said)}. Where no "
        f"difference was found, up to {100 * widest:.0f}% of the loss is not excluded",
    )


def _tasks(found: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{label} ({', '.join(tasks)})" for label, tasks in found.items()) or "none"


def _start(text: str) -> str:
    return text[:1].upper() + text[1:]


def _left_open(content: Mapping[str, Any]) -> float:
    """How much worse a method without a difference from full fine-tuning may be, as a share of full's loss."""
    full = next(arm["mean"] for arm in content["verdict"]["arms"] if arm["name"] == "full")
    return max((arm.high / full for arm in versus_full(content["verdict"]).values() if arm.word == "no difference"),
               default=0.0)  # fmt: skip


def forgetting(found: Results) -> Row:
    """KL from the base on text of its own."""
    parts, adapters, words = [], [], []
    for called, content, _ in found:
        verdict = content["verdict"]["forgetting"]
        arms = versus_full(verdict)
        means = {arm["name"]: arm for arm in verdict["arms"]}
        full = means["full"]
        groups = [f"{FORGETS[word]}: {listed([_moved(arm, means) for arm in group])}"
                  for word, group in grouped(arms.values()).items()]  # fmt: skip
        interval = f"{full['mean']:.2f} ({full['low']:.2f} to {full['high']:.2f})"
        parts.append(f"{_start(called)}, full {interval}; {'; '.join(groups)}")
        adapters += [(called, arms["adapter"].word)] if "adapter" in arms else []
        words += [arm.word for arm in arms.values()]
    less = [called for called, word in adapters if word == "better"]
    more = [called for called, word in adapters if word == "worse"]
    open_ = [called for called, word in adapters if word == "no difference"]
    said = [
        f"{word} on {listed(names)}"
        for word, names in (("less", less), ("more", more), ("no difference found", open_))
        if names
    ]
    return (
        "Adapters (and PEFT) forget less",
        f"KL from the base on its own text, nats per token, against full fine-tuning. {'. '.join(parts)}",
        f"{'holds' if len(less) == len(adapters) else 'not in general'}: adapters forget {', '.join(said)}. All "
        f"methods and tasks: less in {words.count('better')} of {len(words)} cases, more in {words.count('worse')}. "
        "Each at the rate that was best for its loss: forgetting goes with rates as much as with methods",
    )


#: words for a verdict on forgetting
FORGETS = {"better": "less", "no difference": "no difference found", "worse": "more"}


def _moved(arm: Versus, means: Mapping[str, Mapping[str, Any]]) -> str:
    return f"{arm.label} {means[arm.name]['mean']:.2f}"


def least_data(found: Results) -> Row:
    """Share of its own gain that a method has with the fewest rows."""
    texts, verdicts = [], []
    for called, content in _with_curve(found):
        table, base = curve(content), content["base"]["valid_loss"]
        most = max(rows for points in table.values() for rows in points)
        fewest = min(rows for points in table.values() for rows in points)
        both = {name: points for name, points in table.items() if most in points and fewest in points}
        if "prompt" not in both or len(both) < 2:
            continue
        gains = {n: (base - points[fewest].best) / (base - points[most].best) for n, points in both.items()}
        ranked = sorted(gains, key=lambda name: -gains[name])
        best = min(both, key=lambda name: both[name][fewest].best)
        texts.append(
            f"{_start(called)}, share of its own gain on {most:,} rows that a method has with {fewest}: "
            + ", ".join(f"{name} {100 * gains[name]:.0f}%" for name in ranked)
            + f"; lowest loss with {fewest} rows: {best} ({both[best][fewest].best:.2f}; prompt "
            f"{both['prompt'][fewest].best:.2f}){_only(content, fewest)}"
        )
        share = "as a share of its own gain" if ranked[0] == "prompt" else ""
        loss = "in loss" if best == "prompt" else ""
        holds = " and ".join(word for word in (share, loss) if word)
        against = listed([name for name in both if name != "prompt"])
        verdicts.append(
            f"{called} (against {against}): "
            + (f"holds {holds}" if holds else "does not hold")
            + (f"; with {fewest} rows the loss of {best} is lower" if best != "prompt" else "")
        )
    return "Prompt tuning needs the least data", ". ".join(texts), ". ".join(map(_start, verdicts))


def overfits(found: Results) -> Row:
    """The best and the last look of full fine-tuning, by rows."""
    texts, verdicts = [], []
    for called, content in _with_curve(found):
        table = curve(content)
        points = table.get("full")
        if points is None:
            continue
        texts.append(
            f"{_start(called)}: "
            + ", ".join(f"{rows:,} rows {at.best:.3f} and {at.last:.3f}" for rows, at in points.items())
            + _only(content, min(points))
        )
        rises = [f"{rows:,}" for rows, at in points.items() if at.last > 1.02 * at.best]
        level = [f"{rows:,}" for rows, at in points.items() if at.last <= 1.02 * at.best]
        beaten = [
            f"{listed(better)} with {rows:,}"
            for rows in points
            if (better := [n for n, other in table.items() if n != "full" and rows in other
                           and other[rows].best < points[rows].best])
        ]  # fmt: skip
        verdicts.append(
            f"{called}: it overfits (its last loss is more than 2% above its best) with "
            f"{listed(rises) or 'no number of'} rows"
            + (f", not with {listed(level)}" if rises and level else "")
            + f"; the best weights kept, lower losses than full's: {'; '.join(beaten) or 'none'}"
        )
    return (
        "Full fine-tuning overfits below thousands of rows",
        "validation loss, the best of five looks and the last (at most 20 passes, at the rate found on all rows). "
        + ". ".join(texts),
        ". ".join(map(_start, verdicts)),
    )


def _with_curve(found: Results) -> list[tuple[str, Mapping[str, Any]]]:
    return [(called, content) for called, content, _ in found if curve(content)]


def _only(content: Mapping[str, Any], fewest: int) -> str:
    """What the curve of a task lacks: seeds, and points that were planned."""
    table = curve(content)
    seeds = {points[fewest].seeds for points in table.values() if fewest in points}
    planned = [rows for rows, _ in content["preset"]["curve"]]
    gaps = [
        f"{name} at {listed([f'{rows:,}' for rows in planned if rows not in points])}"
        for name, points in table.items()
        if not set(planned) <= set(points)
    ]
    parts = ["one seed on fewer rows"] if seeds == {1} else []
    parts += [f"not measured: {'; '.join(gaps)}"] if gaps else []
    return f" ({'; '.join(parts)})" if parts else ""


def prefix_overhead(found: Results) -> Row:
    """Time for each decoded token, in pairs of rounds with the bare base."""
    parts, lows = [], []
    for _, content, _ in found:
        run = next((r for r in content["runs"] if r["name"] == "prefix" and r.get("decode")), None)
        if run is None:
            continue
        cells = []
        for batch, at in run["decode"].items():
            low, high = at["overhead_range"]
            lows.append(low)
            cells.append(
                f"batch {batch} {100 * at['overhead']:+.0f}% (middle half {100 * low:+.0f} to {100 * high:+.0f}%)"
            )
        parts.append(f"{_where(content)}: {', '.join(cells)}")
    return (
        "Prefix tuning has no inference overhead",
        f"time for each decoded token against the bare base. {'; '.join(parts)}",
        "does not hold here: it has no matrix products of its own, but longer attention and its own mask in each layer"
        if min(lows) > 0.05
        else "within noise in some of these",
    )


def _where(content: Mapping[str, Any]) -> str:
    device = content["environment"].get("device") or ""
    return f"{content['base']['name']}, {'CPU' if content['base']['device'] == 'cpu' else device}"


#: the order that is claimed, fastest first; methods in one group are not ordered
CLAIMED = (("bitfit", "prompt"), ("prefix",), ("lora",), ("adapter",), ("full",))


def speed(found: Results) -> Row:
    """Tokens a second in training, against full fine-tuning."""
    parts, verdicts, holds = [], [], True
    place = {name: number for number, group in enumerate(CLAIMED) for name in group}
    for _, content, _ in found:
        rates: dict[str, list[float]] = {}
        for run in content["runs"]:
            if run.get("train_tokens_per_second"):
                rates.setdefault(run["name"], []).append(run["train_tokens_per_second"])
        if "full" not in rates:
            continue
        middle = {name: statistics.median(values) for name, values in rates.items()}
        ranked = sorted(middle, key=lambda name: -middle[name])
        where = _where(content)
        parts.append(f"{where}: " + ", ".join(f"{name} {middle[name] / middle['full']:.2f}x" for name in ranked))
        pairs = [(a, b) for a in place for b in place if place[a] < place[b] and a in middle and b in middle]
        kept = sum(middle[a] > middle[b] for a, b in pairs)
        holds = holds and kept == len(pairs)
        slower = [name for name in ranked if middle[name] < middle["full"]]
        verdicts.append(
            f"{where}: {kept} of {len(pairs)} pairs in the claimed order; slower than full: {listed(slower) or 'none'}"
        )
    return (
        "Training speed: BitFit and prompt fastest, then prefix, LoRA, adapters, full slowest",
        f"tokens per second against full, one run each, one after another. {'; '.join(parts)}",
        f"{'holds' if holds else 'does not hold here'}. "
        + ". ".join(verdicts)
        + ". Prompt tuning pays for its virtual tokens in every layer, DoRA for its norms; at these sizes overhead "
        "rules",
    )


def storage(found: Results) -> Row:
    """What ten deltas take on disk."""
    parts, most = [], 0.0
    for name in ("embedded", "e2e"):
        content = found.tasks[name]
        sizes = {run["name"]: run["stored_bytes"] for run in content["runs"]}
        most = max(most, *(size / sizes["full"] for name, size in sizes.items() if name != "full"))
        parts.append(
            f"{content['base']['name']}: "
            + ", ".join(f"{name} {units.size(10 * size)}" for name, size in sorted(sizes.items(), key=lambda i: -i[1]))
        )
    return (
        "Ten tasks cost ten models with full fine-tuning, a few per cent of one with PEFT",
        ". ".join(parts),
        f"ten models hold; ten deltas are up to {100 * 10 * most:.0f}% of one model, up to {100 * most:.0f}% of ten"
        if most > 0.01
        else "holds",
    )


def three_times(found: Results) -> Row:
    parts = []
    for cell in found.memory:
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


def gpt3(_: Results) -> Row:
    estimate = plan(GPT3, "full", batch=1, length=2048, dtype="bfloat16", gradient_checkpointing=True)
    weights = estimate.total_parameters
    states = estimate.weights + estimate.gradients + estimate.optimizer
    each = round(states / weights)
    return (
        "175B needs 1.4 TB",
        f"{weights / 1e9:.0f}B weights: 8 bytes each are {8 * weights / TB:.2f} TB; the planner's weights, gradients, "
        f"float32 masters and Adam's moments {states / TB:.2f} TB ({each} bytes a weight), its peak "
        f"with one row of 2,048 tokens, checkpointed, {estimate.peak_allocated / TB:.2f} TB",
        "1.4 TB is 8 bytes a weight: all in bf16, or Adam's moments alone. Mixed precision takes at least twice that "
        + ("(16 bytes, as here)" if each == 16 else f"(16 bytes; {each} here, where the step has its own gradients)"),
    )


CLAIMS: list[Callable[[Results], Row]] = [
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


if __name__ == "__main__":
    main()
