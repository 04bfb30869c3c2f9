"""The rows of a comparison, computed once: terminal, Markdown, CSV, HTML and figure all show these numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

#: the peak that is compared between methods: tensors, which do not depend on what the process did before
MEMORY_KEY = "train_allocated"
TASKS = 10


@dataclass(frozen=True)
class ComparisonRow:
    """One run. Shares are of the base's weights; None is "not measured" or "not defined", never zero."""

    name: str
    method: str
    label: str
    best_for: str
    trainable_parameters: int | None = None
    trainable_share: float | None = None
    stored_parameters: int | None = None
    learning_rate: float | None = None
    train_loss: float | None = None
    valid_loss: float | None = None
    valid_perplexity: float | None = None
    relative_performance: float | None = None
    forgetting_kl_nats_per_token: float | None = None
    train_memory_bytes: int | None = None
    train_tokens_per_second: float | None = None
    speed_to_full: float | None = None
    train_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    inference_overhead: float | None = None
    inference_overhead_noise: float | None = None
    inference_overhead_merged: float | None = None
    inference_overhead_merged_noise: float | None = None
    stored_bytes: int | None = None
    bytes_for_ten_tasks: int | None = None
    swap_seconds: float | None = None
    failed: str | None = None


COLUMNS = tuple(field.name for field in fields(ComparisonRow))


def comparison_rows(comparison: Mapping[str, Any]) -> list[ComparisonRow]:
    """One row for each run, failed ones last with their reason."""
    full = next((run for run in comparison["runs"] if run["method"] == "full"), None)
    rows = [_row(run, full, comparison["base"]) for run in comparison["runs"]]
    rows += [
        ComparisonRow(name=run["method"], method=run["method"], label=run["label"], best_for="", failed=run["reason"])
        for run in comparison["failed"]
    ]
    return rows


def relative_performance(base: float | None, full: float | None, loss: float | None) -> float | None:
    """`100 (base - method) / (base - full)` of validation losses: 0 is the bare base, 100 is full fine-tuning. None
    where full fine-tuning did not improve on the base, or was not run."""
    if base is None or full is None or loss is None or not all(map(math.isfinite, (base, full, loss))) or full >= base:
        return None
    return 100 * (base - loss) / (base - full)


def why_no_relative_performance(comparison: Mapping[str, Any]) -> str | None:
    """The reason why relative performance is undefined in a comparison, None where it is defined."""
    full = next((run for run in comparison["runs"] if run["method"] == "full"), None)
    if full is None:
        return "full fine-tuning was not run, or failed"
    if relative_performance(full["base_valid_loss"], full["valid_loss"], full["valid_loss"]) is None:
        return "full fine-tuning did not improve on the base"
    return None


def _row(run: Mapping[str, Any], full: Mapping[str, Any] | None, base: Mapping[str, Any]) -> ComparisonRow:
    base_rate = run.get("decode_tokens_per_second_base") or base.get("decode_tokens_per_second")
    stored = run.get("stored_bytes")
    speed = run["train_tokens_per_second"]
    return ComparisonRow(
        name=run["name"],
        method=run["method"],
        label=run["label"],
        best_for=run["best_for"],
        trainable_parameters=run["trainable_parameters"],
        trainable_share=run["trainable_parameters"] / run["total_parameters"],
        stored_parameters=run["stored_parameters"],
        learning_rate=run["learning_rate"],
        train_loss=run["train_loss"],
        valid_loss=run["valid_loss"],
        valid_perplexity=run["valid_perplexity"],
        relative_performance=relative_performance(
            run["base_valid_loss"], None if full is None else full["valid_loss"], run["valid_loss"]
        ),
        forgetting_kl_nats_per_token=run["forgetting_kl_nats_per_token"],
        train_memory_bytes=run["peak_memory_bytes"].get(MEMORY_KEY),
        train_tokens_per_second=speed,
        speed_to_full=None if full is None else speed / full["train_tokens_per_second"],
        train_seconds=run["train_seconds"],
        decode_tokens_per_second=run["decode_tokens_per_second"],
        inference_overhead=_overhead(base_rate, run["decode_tokens_per_second"]),
        inference_overhead_noise=_noise(run.get("inference_overhead_range")),
        inference_overhead_merged=_overhead(base_rate, run["decode_tokens_per_second_merged"]),
        inference_overhead_merged_noise=_noise(run.get("inference_overhead_merged_range")),
        stored_bytes=stored,
        bytes_for_ten_tasks=None if stored is None else TASKS * stored,
        swap_seconds=run["swap_seconds"],
    )


def _overhead(base: float | None, rate: float | None) -> float | None:
    """Extra time for each decoded token, as a share of the bare base's."""
    return None if base is None or rate is None else base / rate - 1


def _noise(found: Sequence[float] | None) -> float | None:
    """Half the range of an overhead over the rounds in which it was measured."""
    return None if found is None else (found[1] - found[0]) / 2
