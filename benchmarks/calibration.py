"""Are the statistics of a comparison calibrated? Self-comparisons must hardly ever differ, a planted 3% must be found.

    python benchmarks/calibration.py --simulate --real    # appends to docs/results/calibration.jsonl
    python benchmarks/calibration.py --page               # writes docs/results/calibration.md from it

*Simulated*: the loss of row i under method m and seed s is

    difficulty_i x level_m x (1 + method x row) x (1 + seed x row) x (1 + seed),       x tokens of the row,

with difficulties log-normal (SD 40%), method x row SD 20%, seed x row SD 3% or 8%, seed SD 0.2% to 1%, and three seeds.
The real runs have difficulties of 30% to 44%, seed x row from 8%, and 28% between BitFit and LoRA, whose losses are far
apart. "heavy" tails draw the three relative effects from Student's t with 4 degrees of freedom (SD kept) and
difficulties with SD 80%.
*Real*: spectune-tiny on its embedded task, many seeds a method, all rows judged; then the seeds are split into groups
of three, again and again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta, norm

from spectune.comparing.judging.statistics import CONFIDENCE, estimate

OUT = Path("docs/results/calibration.jsonl")
PAGE = Path("docs/results/calibration.md")
SEEDS = 3
PLANTED = 0.03
ROWS = (55, 500, 4672)
NOISES = (0.002, 0.004, 0.006, 0.008, 0.01)
SEED_ROWS = (0.03, 0.08)
DIFFICULTY, METHOD_ROW = 0.4, 0.2
TOKENS = (5, 45)
#: the order of losses measured on E2E (docs/results/e2e_reference.md), as shares above the best
SPREAD = (0.0, 0.07, 0.14, 0.35, 0.49, 0.8)

#: scenario -> (levels above the first arm, which method each arm is, what is asked of it)
SCENARIOS: dict[str, tuple[tuple[float, ...], tuple[int, ...], str]] = {
    "self, 2 arms": ((0, 0), (0, 0), "self"),
    "self, 6 arms": ((0,) * 6, (0,) * 6, "self"),
    "self, 8 arms": ((0,) * 8, (0,) * 8, "self"),
    "self pair among 6, the others far apart": ((0, *SPREAD[:5]), (0, 0, 1, 2, 3, 4), "self"),
    "self pair, 5 times noisier than 4 others": ((0, 0, *SPREAD[1:5]), (0, 0, 1, 2, 3, 4), "self"),
    "planted, 2 arms": ((0, PLANTED), (0, 0), "planted"),
    "planted, 6 arms, the others far apart": ((0, PLANTED, *SPREAD[2:]), (0, 0, 2, 3, 4, 5), "planted"),
    "planted, 6 arms, the others equal": ((0, PLANTED, 0, 0, 0, 0), (0,) * 6, "planted"),
    "planted, 8 arms, the others equal": ((0, PLANTED, *(0,) * 6), (0,) * 8, "planted"),
    "planted between two methods, 2 arms": ((0, PLANTED), (0, 1), "planted"),
    "planted between two methods, 6 arms far apart": ((0, PLANTED, *SPREAD[2:]), (0, 1, 2, 3, 4, 5), "planted"),
}


def draw(
    random: np.random.Generator, scenario: str, rows: int, noise: float, seed_row: float, tails: str
) -> dict[str, np.ndarray[Any, Any]]:
    """Sums `[seeds, rows, (loss, tokens)]` of each arm."""
    levels, methods, _ = SCENARIOS[scenario]
    heavy = tails == "heavy"

    def effect(scale: float, *shape: int) -> np.ndarray[Any, Any]:
        values = random.standard_t(4, shape) / math.sqrt(2) if heavy else random.standard_normal(shape)
        return np.maximum(1 + scale * values, 0.05)

    spread = math.sqrt(math.log(1 + (DIFFICULTY * (2 if heavy else 1)) ** 2))
    tokens = random.integers(*TOKENS, rows).astype(float)
    difficulty = random.lognormal(-(spread**2) / 2, spread, rows)
    of_method = {method: effect(METHOD_ROW, rows) for method in set(methods)}
    arms = {}
    for index, (level, method) in enumerate(zip(levels, methods, strict=True)):
        own = noise / 5 if "noisier" in scenario and method != 0 else noise
        of_runs = effect(seed_row * own / noise, SEEDS, rows) * effect(own, SEEDS, 1)
        loss = difficulty * (1 + level) * of_method[method] * of_runs
        arms[f"arm {index}"] = np.stack([loss * tokens, np.broadcast_to(tokens, loss.shape)], axis=-1)
    return arms


def at_best(rows: int, noise: float, seed_row: float, tails: str, between: bool) -> float:
    """The power of an uncorrected test at 5% that knows every variance: no test of these runs can have more."""
    spread = (2 if tails == "heavy" else 1) * DIFFICULTY
    low, high = TOKENS
    uneven = (1 + spread**2) * (1 + ((high - low) ** 2 - 1) / 12 / ((high + low - 1) / 2) ** 2)
    variance = 2 / SEEDS * (noise**2 + uneven * seed_row**2 / rows) + uneven * (2 * METHOD_ROW**2 * between) / rows
    return float(norm.cdf(PLANTED / math.sqrt(variance) - norm.ppf((1 + CONFIDENCE) / 2)))


def simulate(comparisons: int, seed: int) -> Iterator[dict[str, Any]]:
    """One record for each cell of scenario, tails, rows and noises."""
    cells = product(enumerate(SCENARIOS), ("normal", "heavy"), ROWS, SEED_ROWS, NOISES)
    for (number, scenario), tails, rows, seed_row, noise in cells:
        levels, methods, kind = SCENARIOS[scenario]
        random = np.random.default_rng(
            [seed, number, tails == "heavy", rows, round(seed_row * 1e4), round(noise * 1e4)]
        )
        found = any_of = pairs = at_five = 0
        for _ in range(comparisons):
            _, tested = estimate(draw(random, scenario, rows, noise, seed_row, tails), relative_noise=True)
            first = [pair for pair in tested if (pair.a, pair.b) == ("arm 0", "arm 1")]
            asked = tested if kind == "self" and not any(levels) else first
            pairs += len(asked)
            at_five += sum(pair.p <= 1 - CONFIDENCE for pair in asked)
            found += sum(pair.p_adjusted <= 1 - CONFIDENCE for pair in asked)
            any_of += any(pair.p_adjusted <= 1 - CONFIDENCE for pair in asked)
        yield {
            "part": "simulated",
            "scenario": scenario,
            "kind": kind,
            "tails": tails,
            "rows": rows,
            "noise": noise,
            "seed_row": seed_row,
            "comparisons": comparisons,
            "any_differs": any_of,
            "pairs": pairs,
            "pairs_differ": found,
            "pairs_differ_uncorrected": at_five,
            "at_best": at_best(rows, noise, seed_row, tails, methods[0] != methods[1]) if kind == "planted" else None,
        }


def real(methods: list[str], seeds: int, steps: int, splits: int, seed: int) -> Iterator[dict[str, Any]]:
    """Train on the embedded task, then compare groups of three seeds of one method with each other."""
    from rich.console import Console

    import spectune
    from spectune import embedded
    from spectune.data import encode, load_rows
    from spectune.evaluation import row_losses
    from spectune.methods import method_from_name
    from spectune.training import environment

    model, tokenizer = spectune.load("spectune-tiny", device="cpu")
    rows = [*load_rows(embedded.VALID), *load_rows(embedded.TEST)]
    examples = encode(rows, tokenizer, max_length=256).examples
    random = np.random.default_rng(seed)
    losses: dict[str, np.ndarray[Any, Any]] = {}
    for name in methods:
        begin, runs = time.time(), []
        for number in range(seeds):
            delta = spectune.attach(model, method_from_name(name), name, seed=number, tokenizer=tokenizer)
            config = spectune.TrainingConfig(max_steps=steps, seed=number, eval_steps=steps, load_best_at_end=False)
            valid = embedded.VALID
            spectune.train(model, tokenizer, delta, embedded.TRAIN, valid, config, console=Console(quiet=True))
            judged = row_losses(model, examples, tokenizer.pad_token_id or 0)
            runs.append(np.column_stack([judged.loss_sums, judged.target_tokens]))
            spectune.detach(model, name)
        losses[name] = np.stack(runs)
        means = losses[name][..., 0].sum(1) / losses[name][..., 1].sum(1)
        tokens = losses[name][0, :, 1]
        by_row = losses[name][..., 0] / tokens
        first = losses[methods[0]][..., 0] / tokens
        yield {
            "part": "runs",
            "method": name,
            "seeds": seeds,
            "steps": steps,
            "rows": len(examples),
            "mean": float(means.mean()),
            "seed_sd_relative": float(means.std(ddof=1) / means.mean()),
            "difficulty_sd": _relative_sd(by_row.mean(0), by_row.mean(0).mean(), tokens),
            "seed_row_sd": math.sqrt(seeds / (seeds - 1)) * _relative_sd(by_row, by_row.mean(0), tokens),
            "method_row_sd_to_first": _relative_sd(by_row.mean(0), first.mean(0), tokens),
            "losses": means.tolist(),
            "seconds": time.time() - begin,
            "environment": environment(),
        }
    for name in methods:
        every = [
            (one, two)
            for one in combinations(range(seeds), SEEDS)
            for two in combinations([s for s in range(seeds) if s not in one], SEEDS)
            if one < two
        ]
        chosen = every if len(every) <= splits else [every[i] for i in random.choice(len(every), splits, replace=False)]
        differs, found = 0, 0
        for one, two in chosen:
            a, b = losses[name][list(one)], losses[name][list(two)]
            _, (pair,) = estimate({"a": a, "b": b}, relative_noise=True)
            differs += pair.p_adjusted <= 1 - CONFIDENCE
            worse = b * np.array([1 + PLANTED, 1.0])
            _, (pair,) = estimate({"a": a, "b": worse}, relative_noise=True)
            found += pair.p_adjusted <= 1 - CONFIDENCE
        yield {
            "part": "splits",
            "method": name,
            "splits": len(chosen),
            "of": len(every),
            "self_differs": int(differs),
            "planted_found": int(found),
        }


def _relative_sd(values: np.ndarray[Any, Any], expected: Any, tokens: np.ndarray[Any, Any]) -> float:
    """Standard deviation of values `[..., rows]` around what is expected of them, as a share of it; each run's own mean
    taken off, rows weighted by their tokens."""
    relative = np.atleast_2d(values / expected)
    relative = relative / np.average(relative, axis=1, weights=tokens)[:, None] - 1
    return float(np.sqrt(np.average(relative**2, axis=1, weights=tokens).mean()))


# ---------------------------------------------------------------------------------------------------------- the page


def interval(hits: int, trials: int) -> str:
    """Clopper and Pearson's 95% interval of a share, as per cent."""
    low = beta.ppf(0.025, hits, trials - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, trials - hits) if hits < trials else 1.0
    return f"{100 * hits / trials:.1f}% ({100 * low:.1f} to {100 * high:.1f})"


def page(records: list[dict[str, Any]]) -> str:
    """docs/results/calibration.md, from the records alone."""
    cells = [record for record in records if record["part"] == "simulated"]
    noises, rows_of = " | ".join(f"{100 * n:g}%" for n in NOISES), " | ".join(f"{r:,} rows" for r in ROWS)
    lines = [
        "# Calibration of the statistics",
        "",
        'Comparing a method with itself under other seeds must say "differs" in at most 5% of cases, and a planted '
        "difference of 3% of the loss must be found in at least 80%. How the statistics work is in "
        "[statistics.md](../statistics.md).",
        "",
        *_in_short(cells),
        "## Simulated",
        "",
        f"Three seeds an arm; judged rows {', '.join(f'{rows:,}' for rows in ROWS)}; standard deviation over seeds "
        f"{', '.join(f'{100 * noise:g}%' for noise in NOISES)} of the loss, and of each row by itself "
        f"{' or '.join(f'{100 * x:g}%' for x in SEED_ROWS)} more; normal and heavy tails; all combinations equally "
        "often. The model is at the top of `benchmarks/calibration.py`. Shares have Clopper and Pearson's 95% "
        "interval.",
        "",
        'Self-comparisons: "differs" after Holm\'s correction in at least one of the pairs, and how often a single '
        "pair has p < 0.05, uncorrected.",
        "",
        "| scenario | tails | comparisons | some pair differs | single pairs, uncorrected |",
        "|---|---|---:|---:|---:|",
    ]
    for scenario, tails, group in _grouped(cells, "self"):
        trials, pairs = _sum(group, "comparisons"), _sum(group, "pairs")
        lines.append(
            f"| {scenario} | {tails} | {trials:,} | {interval(_sum(group, 'any_differs'), trials)} | "
            f"{100 * _sum(group, 'pairs_differ_uncorrected') / pairs:.1f}% of {pairs:,} |"
        )
    trials = sum(cell["comparisons"] for cell in cells if cell["kind"] == "self")
    hits = sum(cell["any_differs"] for cell in cells if cell["kind"] == "self")
    lines += [
        f"| **all** | | {trials:,} | **{interval(hits, trials)}** | |",
        "",
        f"Planted {100 * PLANTED:g}%: how often the pair is found after Holm's correction; in all, by the seeds' "
        'standard deviation, by judged rows. "At best" is the power of an uncorrected test that knows every variance: '
        "no test of these runs can find more. Without further words one arm is the other's method with its losses "
        f"times {1 + PLANTED}.",
        "",
        f"| scenario | tails | comparisons | found | at best | {noises} | {rows_of} |",
        "|---|---|---:|---:|---:|" + "---:|" * (len(NOISES) + len(ROWS)),
    ]
    for scenario, tails, group in _grouped(cells, "planted"):
        trials = _sum(group, "comparisons")
        found = interval(_sum(group, "any_differs"), trials)
        best = 100 * sum(cell["at_best"] for cell in group) / len(group)
        parts = [_found(group, "noise", noise) for noise in NOISES] + [_found(group, "rows", rows) for rows in ROWS]
        lines.append(f"| {scenario} | {tails} | {trials:,} | {found} | {best:.0f}% | {' | '.join(parts)} |")
    lines += _real_part(records)
    lines += [
        "",
        "Made by `python benchmarks/calibration.py --simulate --real`, this page by the same with `--page`.",
        "",
    ]
    return "\n".join(lines)


def _in_short(cells: list[dict[str, Any]]) -> list[str]:
    """What came of the two demands, failures included."""

    def of(kind: str, *parts: str) -> str:
        group = [c for c in cells if c["kind"] == kind and all(part in c["scenario"] for part in parts)]
        return f"{100 * _sum(group, 'any_differs') / _sum(group, 'comparisons'):.0f}%"

    return [
        f"In short, simulated: self-comparisons differ in {of('self')}; in {of('self', 'noisier')} where the pair is "
        f"five times noisier than the other arms. A planted 3% is found in {of('planted', 'planted, 2')} of "
        f"comparisons of two arms and in {of('planted', 'planted, 6', 'far apart')} among six arms that are far "
        f"apart. It is found too rarely where all other arms are equal ({of('planted', 'planted, 6', 'equal')} of six, "
        f"{of('planted', 'planted, 8', 'equal')} of eight: 15 and 28 pairs to correct for), with 55 rows, and where "
        "seeds differ by 0.8% and more: more seeds help there. Between two methods whose rows differ by themselves "
        "(SD 20%) it takes thousands of rows.",
        "",
    ]


def _real_part(records: list[dict[str, Any]]) -> list[str]:
    runs = {record["method"]: record for record in records if record["part"] == "runs"}
    splits = {record["method"]: record for record in records if record["part"] == "splits"}
    if not runs:
        return []
    first = next(iter(runs.values()))
    lines = [
        "",
        "## Real",
        "",
        f"spectune-tiny on its embedded task, {first['steps']} steps at each method's default rate, on "
        f"{first['rows']} rows. Seeds split into two groups of three, again and again: the splits share runs, so that "
        "they are not independent, and no interval is given. Planted: the losses of one group times 1.03.",
        "",
        "| method | seeds | loss | SD over seeds | splits | self differs | planted found |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method, run in runs.items():
        split = splits[method]
        lines.append(
            f"| {method} | {run['seeds']} | {run['mean']:.3f} | {100 * run['seed_sd_relative']:.2f}% | "
            f"{split['splits']:,} of {split['of']:,} | {100 * split['self_differs'] / split['splits']:.1f}% | "
            f"{100 * split['planted_found'] / split['splits']:.1f}% |"
        )
    lines += ["", f"Measured on {first['environment']['device']}."]
    return lines


def _grouped(cells: list[dict[str, Any]], kind: str) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    for scenario in dict.fromkeys(cell["scenario"] for cell in cells if cell["kind"] == kind):
        for tails in ("normal", "heavy"):
            yield scenario, tails, [c for c in cells if (c["scenario"], c["tails"]) == (scenario, tails)]


def _found(cells: list[dict[str, Any]], key: str, value: float) -> str:
    part = [cell for cell in cells if cell[key] == value]
    return f"{100 * _sum(part, 'any_differs') / _sum(part, 'comparisons'):.0f}%"


def _sum(cells: list[dict[str, Any]], key: str) -> int:
    return sum(cell[key] for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--comparisons", type=int, default=12, help="simulated ones for each cell")
    parser.add_argument("--methods", default="bitfit,lora")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=120, help="those of --quick")
    parser.add_argument("--splits", type=int, default=1000, help="at most, for each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    parts: list[Iterator[dict[str, Any]]] = []
    parts += [simulate(args.comparisons, args.seed)] if args.simulate else []
    parts += [real(args.methods.split(","), args.seeds, args.steps, args.splits, args.seed)] if args.real else []
    for part in parts:
        for record in part:
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print({k: v for k, v in record.items() if k not in ("losses", "environment")}, flush=True)
    if args.page:
        PAGE.write_text(page([json.loads(line) for line in args.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
