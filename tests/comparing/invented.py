"""Invented comparisons on disk, for the verdict and the recommendation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from spectune.comparing.advising.recommend import recommend
from spectune.comparing.judging.verdict import verdict
from spectune.results import ComparisonResult, Limits

LABELS = {
    "full": "Full",
    "adapter": "Adapter",
    "prefix": "Prefix tuning",
    "prompt": "Prompt tuning",
    "lora": "LoRA",
    "bitfit": "BitFit",
}
#: memory, stored bytes, overhead unmerged and merged, training seconds
COSTS: dict[str, tuple[float, float, float, float | None, float]] = {
    "full": (16e9, 500e6, 0.0, 0.0, 300),
    "adapter": (6.0e9, 4e6, 0.2, None, 200),
    "prefix": (5.6e9, 1e6, 0.05, None, 210),
    "prompt": (5.5e9, 1e5, 0.05, None, 220),
    "lora": (6.1e9, 8e6, 0.3, 0.01, 200),
    "bitfit": (5.4e9, 2e5, 0.1, 0.01, 180),
}


def invent(
    folder: Path,
    levels: dict[str, float],
    *,
    seeds: int = 3,
    rows: int = 200,
    noise: float = 0.003,
    metric: bool = False,
    prompts: int | None = None,
    passages: int = 16,
) -> dict[str, Any]:
    """A comparison's content, with its rows on disk: `levels` are the arms' losses, nats a token."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, 30, rows)
    tokens[0] = 0  # a row without a target token
    hard = random.lognormal(0, 0.3, rows)
    runs = []
    for name, level in levels.items():
        method = name.partition("-")[0]
        for seed in range(seeds):
            per_token = level * hard * (1 + noise * random.standard_normal())
            per_token = per_token * (1 + 0.02 * random.standard_normal(rows))
            lines = [
                {
                    "row": i,
                    "origin": f"valid.jsonl:{i + 1}",
                    "loss_sum": float(per_token[i] * tokens[i]),
                    "target_tokens": int(tokens[i]),
                    "metrics": {"rouge_l": float(1 / (1 + per_token[i]))} if metric and i < 50 else {},
                    "statistics": {},
                    "prompt": f"prompt {i % (prompts or rows)}",
                }
                for i in range(rows)
            ]
            place = f"runs/{name}/seed-{seed}-ab12cd34"
            write_rows(folder / place / "rows.jsonl", lines)
            memory, stored, overhead, merged, seconds = COSTS.get(method, COSTS["lora"])
            runs.append(
                {
                    "name": name,
                    "method": method,
                    "label": LABELS.get(method, method),
                    "seed": seed,
                    "folder": place,
                    "rows_file": f"{place}/rows.jsonl",
                    "valid_loss": level,
                    "forgetting_by_passage": (level * random.gamma(5, 1, passages)).tolist(),
                    "peak_memory_bytes": {"train_allocated": int(memory)},
                    "stored_bytes": int(stored),
                    "train_seconds": seconds,
                    "decode_tokens_per_second": 100 / (1 + overhead),
                    "decode_tokens_per_second_base": 100.0,
                    "decode_tokens_per_second_merged": None if merged is None else 100 / (1 + merged),
                }
            )
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "passages.json").write_text(json.dumps({"tokens": [128] * passages}))
    bare = [{"row": i, "loss_sum": 4.0 * float(n), "target_tokens": int(n)} for i, n in enumerate(tokens)]
    write_rows(folder / "base" / "rows.jsonl", bare)
    return {"base": {"name": "a-base", "valid_loss": 4.0}, "runs": runs, "failed": []}


def judged(content: dict[str, Any], folder: Path | str) -> dict[str, Any]:
    """The verdict on a comparison's content, as its file has it."""
    return verdict(ComparisonResult.model_validate(content), folder).to_dict()


def recommended(content: dict[str, Any], limits: Limits | None = None) -> dict[str, Any]:
    """The recommendation from a comparison's content, as its file has it."""
    return recommend(ComparisonResult.model_validate(content), limits).to_dict()


def write_rows(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
