"""An invented comparison of eight arms with three seeds each, with the files that such a one leaves in its folder.

Every number is made up, but stands in a believable relation to the others: losses fall along curves, intervals hold
their means, the verdict follows from the differences. Some of its text is hostile on purpose.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOTAL = 4_975_264
BASE_LOSS = 3.81
SEEDS = (0, 1, 2)
ROWS = 120
GENERATED = 48
PASSAGES = 16
STEPS = 480
#: would run if it were ever taken for markup
HOSTILE = "</script></style><script>window.hostile=1</script><img src=x onerror='window.hostile=1'> {{ 7*7 }}"
RTL = "\u0645\u0637\u0639\u0645 \u0631\u062e\u064a\u0635 \u0642\u0631\u0628 \u0627\u0644\u0646\u0647\u0631"
LONG = "and again " * 3000

#: name: (label, trainable weights, loss, forgetting, memory, tokens a second, overhead, merges, learning rate)
ARMS: dict[str, tuple[str, int, float, float, int, float, float, bool, float]] = {
    "full": ("Full", TOTAL, 0.268, 2.58, 131_466_936, 3917, 0.00, True, 3e-4),
    "adapter": ("Adapter", 144_768, 0.428, 1.30, 88_500_000, 5320, 0.26, False, 1e-3),
    "prefix": ("Prefix tuning", 44_800, 1.204, 0.36, 99_000_000, 5510, 0.37, False, 1e-2),
    "prompt": ("Prompt tuning", 4_480, 1.531, 1.57, 110_000_000, 4050, 0.03, False, 1e-1),
    "lora": ("LoRA", 286_720, 0.272, 2.00, 108_000_000, 4170, 0.33, True, 2e-3),
    "bitfit": ("BitFit", 12_544, 0.694, 2.02, 92_500_000, 5030, 0.25, True, 1e-2),
    "dora": ("DoRA", 300_000, 0.279, 1.95, 119_000_000, 3310, 0.47, True, 2e-3),
    "lora-2": ("LoRA", 71_680, 0.342, 1.61, 99_500_000, 4350, 0.31, True, 4e-3),
}
HALF_WIDTH = 0.016
#: name: its loss as a share of the whole; one name is long, one hostile
SOURCES = {"web": 1.2, "books": 0.8, "questions-and-answers-of-a-long-name": 1.0, HOSTILE: 0.9}


def sample(folder: Path | None = None) -> dict[str, Any]:
    """The content of `comparison.json`; with a folder, its rows, curves and base files are written there too."""
    chance = random.Random(0)
    runs = [_run(name, seed, chance) for name in ARMS for seed in SEEDS if (name, seed) != ("prompt", 2)]
    content: dict[str, Any] = {
        "base": {
            "name": "spectune-tiny",
            "total_parameters": TOTAL,
            "valid_loss": BASE_LOSS,
            "device": "cpu",
            "dtype": "float32",
            "decode_tokens_per_second": 400.0,
            "decode": {"1": 400.0, "16": 3100.0},
            "metrics": {"rouge_l": 0.112, "bleu": 1.3},
            "judged_loss_by_source": {name: BASE_LOSS * factor for name, factor in SOURCES.items()},
        },
        "data": {
            "train_rows": 4800,
            "valid_rows": ROWS,
            "held_out": None,
            "judged_on": "valid",
            "judged_rows": ROWS,
            "generated_rows": GENERATED,
            "retained_passages": PASSAGES,
            "retained_tokens": 2048,
            "retained_from": "sampled from the base at temperature 1",
            "target_tokens_per_step": 134.0,
            "mixture": "2,400 rows of web (x 0.5), 1,800 of books (x 2): 4,800 examples an epoch",
        },
        "settings": {"max_steps": STEPS, "per_device_train_batch_size": 8, "lr_scheduler_type": "linear", "seed": 0},
        "preset": {
            "name": "default",
            "seeds": list(SEEDS),
            "rungs": [[8, 0.0625], [4, 0.125], [2, 0.25]],
            "final_steps": STEPS,
            "final_target_tokens": STEPS * 134,
            "search_target_tokens": STEPS * 201,
            "total_target_tokens": 8 * STEPS * 134 * 4,
            "search_valid_rows": 100,
            "covers_training_noise": True,
            "memory_in_own_process": False,
        },
        "environment": {
            "spectune": "0.1.0",
            "python": "3.11.2",
            "platform": "Linux-6.1-x86_64",
            "packages": {"torch": "2.13.0", "transformers": "5.24.0"},
            "device": "cpu",
            "cuda": None,
            "threads": 2,
        },
        "scale": [
            {
                "model": "GPT-2 124M",
                "total_parameters": 124_439_808,
                "shares": {
                    "full": {"parameters": 124_439_808, "share": 1.0},
                    "lora": {"parameters": 2_359_296, "share": 0.01896},
                },
            }
        ],
        "arms": [
            {
                "name": name,
                "method": name.split("-")[0],
                "label": arm[0],
                "best_for": f"what {arm[0]} is for",
                "settings": {"name": name.split("-")[0]},
                "stored_parameters": arm[1],
                "trainable_parameters": arm[1],
            }
            for name, arm in ARMS.items()
        ],
        "searches": {name: _search(name, chance) for name in ARMS},
        "runs": runs,
        "curves": [_curve(name, rows, chance) for name in ARMS for rows in (100, 300, 1000, 4800)],
        "failed": [
            {
                "name": "prompt",
                "method": "prompt",
                "label": "Prompt tuning",
                "seed": 2,
                "learning_rate": 0.1,
                "reason": f"the loss is nan in step 3 {HOSTILE}",
            },
            *(
                {
                    "name": "ia3",
                    "method": "ia3",
                    "label": "IA3",
                    "seed": seed,
                    "learning_rate": 0.01,
                    "reason": "out of memory: 12.3 GB wanted, 8 GB there",
                }
                for seed in SEEDS
            ),
        ],
        "verdict": _verdict(),
        "recommendation": {
            "limits": {"max_memory_bytes": 120_000_000},
            "pareto": ["full", "lora", "lora-2", "adapter", "prefix", "prompt"],
            "axes": ["judged_loss", "train_memory_bytes", "stored_bytes", "inference_overhead", "train_seconds"],
            "pick": "lora",
            "abstains": None,
            "reasons": [
                {
                    "text": "No method has a lower loss: full fine-tuning and DoRA differ from it by less than noise.",
                    "runs": [_rows_file("lora", seed) for seed in SEEDS] + [_rows_file("full", seed) for seed in SEEDS],
                },
                {"text": "It stores 1.15 MB a task, 17 times less than full.", "runs": [_rows_file("lora", 0)]},
            ],
            "excluded": [
                {
                    "name": "full",
                    "limit": "max_memory_bytes",
                    "text": "Full is out: 131 MB in training, and the limit is 120 MB.",
                    "runs": [_rows_file("full", 0)],
                }
            ],
        },
    }
    if folder is not None:
        _write(folder, content, chance)
    return content


def _rows_file(name: str, seed: int) -> str:
    return f"runs/{name}/seed-{seed}-ab12cd3{seed}/rows.jsonl"


def _run(name: str, seed: int, chance: random.Random) -> dict[str, Any]:
    label, weights, loss, forgetting, memory, speed, overhead, merges, rate = ARMS[name]
    loss += (seed - 1) * 0.006 + chance.uniform(-0.002, 0.002)
    bare = 400.0 * chance.uniform(0.99, 1.01)
    return {
        "method": name.split("-")[0],
        "name": name,
        "label": label,
        "best_for": f"what {label} is for",
        "settings": {"name": name.split("-")[0]},
        "seed": seed,
        "learning_rate": rate,
        "trainable_parameters": weights,
        "stored_parameters": weights,
        "total_parameters": TOTAL,
        "stored_bytes": 4 * weights + 2300,
        "steps": STEPS,
        "best_step": STEPS,
        "train_tokens": 160_000,
        "target_tokens": STEPS * 134,
        "train_loss": loss * 0.8,
        "valid_loss": loss,
        "last_valid_loss": loss * 1.01,
        "base_valid_loss": BASE_LOSS,
        "valid_perplexity": math.exp(loss),
        "judged_loss": loss,
        "judged_on": "valid",
        "judged_loss_by_source": {source: loss * factor for source, factor in SOURCES.items()},
        "train_tokens_per_second": speed * chance.uniform(0.98, 1.02),
        "train_seconds": 160_000 / speed,
        "evaluation_seconds": 4.2,
        "peak_memory_bytes": {"train_allocated": memory, "train_resident": 6 * memory},
        "predicted_memory_bytes": {
            "weights": 4 * TOTAL,
            "gradients": 4 * weights,
            "optimizer": 8 * weights,
            "activations": memory // 3,
            "logits": memory // 8,
            "workspace": 0,
            "peak_allocated": round(memory * chance.uniform(0.96, 1.05)),
            "peak_reserved": round(memory * 1.1),
        },
        "memory_prediction_source": "formula",
        "stopped_early": False,
        "metrics": {
            "rouge_l": 0.72 - 0.25 * loss + chance.uniform(-0.01, 0.01),
            "bleu": 58 - 21 * loss + chance.uniform(-1, 1),
        },
        "forgetting_kl_nats_per_token": forgetting * chance.uniform(0.97, 1.03),
        "forgetting_by_passage": [forgetting * 128 * chance.uniform(0.7, 1.3) for _ in range(PASSAGES)],
        "decode_tokens_per_second": bare / (1 + overhead),
        "decode_tokens_per_second_base": bare,
        "decode_tokens_per_second_merged": bare * 0.995 if merges else None,
        "inference_overhead_range": [overhead - 0.04, overhead + 0.05],
        "inference_overhead_merged_range": [-0.03, 0.04] if merges else None,
        "decode": {
            "16": {
                "tuned": 3100.0 / (1 + overhead / 2),
                "merged": 3090.0 if merges else None,
                "base": 3100.0,
                "overhead": overhead / 2,
                "overhead_range": [overhead / 2 - 0.02, overhead / 2 + 0.02],
                "overhead_merged": 0.003 if merges else None,
                "overhead_merged_range": [-0.02, 0.02] if merges else None,
            }
        },
        "swap_seconds": 0.013,
        "rows_file": _rows_file(name, seed),
        "folder": f"runs/{name}/seed-{seed}-ab12cd3{seed}",
        "key": f"ab12cd3{seed}",
    }


def _search(name: str, chance: random.Random) -> dict[str, Any]:
    best, loss = ARMS[name][8], ARMS[name][2]
    rates = [best * 2.2 ** (k - 4) for k in range(8)]
    by_distance = sorted(rates, key=lambda rate: abs(math.log(rate / best)))
    trials = []
    for tried, share in ((8, 0.0625), (4, 0.125), (2, 0.25)):
        for rate in sorted(by_distance[:tried]):
            diverged = rate == rates[-1]
            value = loss + 0.14 * math.log(rate / best) ** 2 + 0.15 / share**0.5 + chance.uniform(0, 0.05)
            trials.append(
                {
                    "learning_rate": rate,
                    "steps": round(STEPS * share),
                    "share": share,
                    "target_tokens": round(STEPS * share * 134),
                    "valid_loss": None if diverged else value,
                    "reason": "the loss is nan in step 12" if diverged else None,
                    "extension": False,
                }
            )
    return {
        "range": [rates[0], rates[-1]],
        "source": "the papers and PEFT's examples",
        "trials": trials,
        "best": best,
        "edge": "high" if name == "prompt" else None,
        "sentence": f"{ARMS[name][0]}: {best:g} is best of 8 rates from {rates[0]:.2g} to {rates[-1]:.2g}.",
    }


def _curve(name: str, rows: int, chance: random.Random) -> dict[str, Any]:
    loss = ARMS[name][2] + 1.4 * (4800 / rows) ** 0.25 - 1.4 + chance.uniform(-0.02, 0.02)
    return {
        "name": name,
        "method": name.split("-")[0],
        "seed": 0,
        "rows": rows,
        "learning_rate": ARMS[name][8],
        "steps": STEPS,
        "valid_loss": loss,
        "last_valid_loss": loss * 1.05,
        "train_loss": loss * 0.6,
        "base_valid_loss": BASE_LOSS,
    }


def _verdict() -> dict[str, Any]:
    losses = {name: arm[2] for name, arm in ARMS.items()}
    return {
        "measure": "judged_loss",
        "rows": ROWS,
        "seeds": len(SEEDS),
        "covers_training_noise": True,
        "confidence": 0.95,
        "correction": "holm",
        **_ranked(losses, HALF_WIDTH, lower_is_better=True),
        "versus_full": {
            name: None if name == "full" else "no difference" if loss - losses["full"] < 2 * HALF_WIDTH else "worse"
            for name, loss in losses.items()
        },
        "sentences": [
            "Full, LoRA and DoRA are best: no difference between them is larger than noise.",
            "LoRA (lora-2) is worse than these by 0.07 nats per target token (26%), and better than the other four.",
        ],
        "metrics": {
            "rouge_l": {
                **_ranked({n: 0.72 - 0.25 * v for n, v in losses.items()}, 0.02, lower_is_better=False),
                "higher_is_better": True,
                "sentences": ["ROUGE-L: the same order as the loss, with Adapter level with LoRA (lora-2)."],
            }
        },
        "forgetting": {
            **_ranked({n: arm[3] for n, arm in ARMS.items()}, 0.11, lower_is_better=True),
            "sentences": ["Forgetting: Prefix tuning forgets least, Full most."],
        },
    }


def _ranked(values: Mapping[str, float], half: float, *, lower_is_better: bool) -> dict[str, Any]:
    """A partial order of made-up values whose intervals are all `half` wide to each side."""
    names = sorted(values, key=lambda name: values[name], reverse=not lower_is_better)
    pairs = []
    for index, a in enumerate(names):
        for b in names[index + 1 :]:
            difference = values[b] - values[a]
            pairs.append(
                {
                    "a": a,
                    "b": b,
                    "difference": difference,
                    "low": difference - 1.4 * half,
                    "high": difference + 1.4 * half,
                    "relative": difference / values[a],
                    "p": 0.001 if abs(difference) > 1.4 * half else 0.4,
                    "p_adjusted": 0.01 if abs(difference) > 1.4 * half else 1.0,
                    "differs": abs(difference) > 1.4 * half,
                    "effect_size": difference / 0.3,
                }
            )
    apart = {(p["a"], p["b"]) for p in pairs if p["differs"]}
    groups: list[list[str]] = []
    for index, name in enumerate(names):
        group = [name, *(other for other in names[index + 1 :] if (name, other) not in apart)]
        if not any(set(group) <= set(known) for known in groups):
            groups.append(group)
    order = [[a, b] for a, b in sorted(apart) if not any((a, c) in apart and (c, b) in apart for c in names)]
    return {
        "arms": [
            {
                "name": name,
                "label": ARMS[name][0],
                "mean": values[name],
                "low": values[name] - half,
                "high": values[name] + half,
                "seed_sd": 0.006,
                "best": name in groups[0],
            }
            for name in names
        ],
        "pairs": pairs,
        "groups": groups,
        "order": order,
    }


def _write(folder: Path, content: dict[str, Any], chance: random.Random) -> None:
    difficulty = [chance.uniform(0.4, 1.8) for _ in range(ROWS)]
    (folder / "base").mkdir(parents=True, exist_ok=True)
    _jsonl(folder / "base" / "rows.jsonl", [_row(n, BASE_LOSS * hard, "base") for n, hard in enumerate(difficulty)])
    (folder / "base" / "passages.json").write_text(json.dumps({"tokens": [128] * PASSAGES}))
    for run in content["runs"]:
        here = (folder / run["rows_file"]).parent
        here.mkdir(parents=True, exist_ok=True)
        rows = [_row(n, run["judged_loss"] * hard, run["name"]) for n, hard in enumerate(difficulty)]
        _jsonl(here / "rows.jsonl", rows)
        _jsonl(here / "metrics.jsonl", _curve_of(run, chance))


def _row(number: int, loss: float, name: str) -> dict[str, Any]:
    tokens = 10 + number % 17
    row: dict[str, Any] = {
        "row": number,
        "origin": f"valid.jsonl:{number + 1}",
        "loss_sum": loss * tokens,
        "target_tokens": tokens,
        "metrics": {},
        "statistics": {},
        "prompt": f"name[Restaurant {number}], food[Italian], priceRange[cheap], near[The River]\n",
        "references": [
            f"Restaurant {number} is a cheap Italian place near The River.",
            f"Near The River, Restaurant {number} serves cheap Italian food.",
        ],
    }
    if number < GENERATED:
        texts = {
            "base": f"Restaurant {number} the the of {LONG}",
            "lora": f"Restaurant {number} is a cheap Italian place near The River. {HOSTILE}",
            "prefix": f"{RTL} {number}",
            "prompt": "x" * 400,
        }
        row["prediction"] = texts.get(name, f"Restaurant {number} serves cheap Italian food by The River.")
        row["metrics"] = {"rouge_l": max(0.0, 0.9 - 0.2 * loss), "exact_match": 0.0}
    return row


def _curve_of(run: Mapping[str, Any], chance: random.Random) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        left = math.exp(-4 * step / STEPS)
        loss = run["train_loss"] + (BASE_LOSS - run["train_loss"]) * left + chance.uniform(-0.2, 0.2)
        lines.append({"step": step, "epoch": 0, "loss": loss, "learning_rate": 1e-3, "tokens": 330 * step})
        if step % 60 == 0:
            valid = run["valid_loss"] + (BASE_LOSS - run["valid_loss"]) * (left - math.exp(-4)) * 0.7
            lines.append({"step": step, "epoch": 0, "train_loss": loss, "valid_loss": valid})
    return lines


def _jsonl(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
