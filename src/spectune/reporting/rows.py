"""The rows of a comparison, computed once: terminal, Markdown, CSV, page and figures all show these numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from spectune.reporting.arms import arm_labels, failures, method_of, runs_by_arm

#: the peak that is compared between methods: tensors, which do not depend on what the process did before
MEMORY_KEY = "train_allocated"
#: the prediction of the same
PREDICTED_KEY = "peak_allocated"
TASKS = 10


@dataclass(frozen=True)
class ComparisonRow:
    """One arm: its runs over seeds as one. Shares are of the base's weights; None is "not measured" or "not defined",
    never zero.

    Numbers are means over the seeds that ended, except: `train_memory_bytes` is the largest peak, `valid_perplexity`
    the exponential of the mean loss, and an overhead's noise the mean of the runs'. `loss` is what the verdict ranks
    by: nats per target token on the judged rows, with its interval `loss_low` to `loss_high` where there is a verdict,
    else the validation loss. One run is shown as it is.
    """

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
    seeds: int = 0
    seeds_failed: int = 0
    loss: float | None = None
    loss_low: float | None = None
    loss_high: float | None = None
    loss_seed_sd: float | None = None
    forgetting_low: float | None = None
    forgetting_high: float | None = None
    predicted_memory_bytes: int | None = None
    memory_prediction_source: str | None = None
    inference_overhead_16: float | None = None
    inference_overhead_16_noise: float | None = None
    inference_overhead_16_merged: float | None = None
    inference_overhead_16_merged_noise: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    metric_intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


#: the fields that are one number or word each; metrics have names of their own
PLAIN = tuple(f.name for f in fields(ComparisonRow) if f.name not in ("metrics", "metric_intervals"))


def comparison_rows(comparison: Mapping[str, Any]) -> list[ComparisonRow]:
    """One row for each arm with a run that ended, in the comparison's order; then the arms of which none did."""
    labels = arm_labels(comparison)
    failed = failures(comparison)
    full = _full(comparison)
    rows = [
        _row(labels[name], runs, full, comparison, sum(f.name == name for f in failed))
        for name, runs in runs_by_arm(comparison).items()
    ]
    ended = {row.name for row in rows}
    for name in dict.fromkeys(f.name for f in failed if f.name not in ended):
        reasons = list(dict.fromkeys(f.reason for f in failed if f.name == name))
        rows.append(
            ComparisonRow(
                name=name,
                method=method_of(name, comparison),
                label=labels[name],
                best_for=next((a["best_for"] for a in comparison.get("arms", ()) if a["name"] == name), ""),
                failed="; ".join(reasons),
                seeds_failed=sum(f.name == name for f in failed),
            )
        )
    return rows


def relative_performance(base: float | None, full: float | None, loss: float | None) -> float | None:
    """`100 (base - method) / (base - full)` of validation losses: 0 is the bare base, 100 is full fine-tuning. None
    where full fine-tuning did not improve on the base, or was not run."""
    if base is None or full is None or loss is None or not all(map(math.isfinite, (base, full, loss))) or full >= base:
        return None
    return 100 * (base - loss) / (base - full)


def why_no_relative_performance(comparison: Mapping[str, Any]) -> str | None:
    """The reason why relative performance is undefined in a comparison, None where it is defined."""
    full = _full(comparison)
    if full is None:
        return "full fine-tuning was not run, or failed"
    loss = _mean(full, "valid_loss")
    if relative_performance(_mean(full, "base_valid_loss"), loss, loss) is None:
        return "full fine-tuning did not improve on the base"
    return None


def metric_names(rows: Iterable[ComparisonRow]) -> list[str]:
    """Every task metric that some arm has, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def _full(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The runs of the first arm of full fine-tuning."""
    return next((runs for runs in runs_by_arm(comparison).values() if runs[0]["method"] == "full"), None)


def _row(
    label: str,
    runs: list[Mapping[str, Any]],
    full: list[Mapping[str, Any]] | None,
    comparison: Mapping[str, Any],
    seeds_failed: int,
) -> ComparisonRow:
    first = runs[0]
    name, base = first["name"], comparison["base"]
    loss, stored, speed = _mean(runs, "valid_loss"), _mean(runs, "stored_bytes"), _mean(runs, "train_tokens_per_second")
    full_speed = None if full is None else _mean(full, "train_tokens_per_second")
    judged = _arm(comparison.get("verdict"), name)
    kept = _arm((comparison.get("verdict") or {}).get("forgetting"), name)
    metrics = {
        key: value
        for key in _metric_keys(runs)
        if (value := _mean([run.get("metrics") or {} for run in runs], key)) is not None
    }
    return ComparisonRow(
        name=name,
        method=first["method"],
        label=label,
        best_for=first["best_for"],
        trainable_parameters=first["trainable_parameters"],
        trainable_share=first["trainable_parameters"] / first["total_parameters"],
        stored_parameters=first["stored_parameters"],
        learning_rate=first["learning_rate"],
        train_loss=_mean(runs, "train_loss"),
        valid_loss=loss,
        valid_perplexity=first["valid_perplexity"] if len(runs) == 1 or loss is None else _exp(loss),
        relative_performance=relative_performance(
            _mean(runs, "base_valid_loss"), None if full is None else _mean(full, "valid_loss"), loss
        ),
        forgetting_kl_nats_per_token=_mean(runs, "forgetting_kl_nats_per_token"),
        train_memory_bytes=max((m for run in runs if (m := run["peak_memory_bytes"].get(MEMORY_KEY))), default=None),
        train_tokens_per_second=speed,
        speed_to_full=None if speed is None or not full_speed else speed / full_speed,
        train_seconds=_mean(runs, "train_seconds"),
        decode_tokens_per_second=_mean(runs, "decode_tokens_per_second"),
        inference_overhead=_over(runs, lambda run: _overhead(run, base)),
        inference_overhead_noise=_over(runs, lambda run: _noise(run.get("inference_overhead_range"))),
        inference_overhead_merged=_over(runs, lambda run: _overhead(run, base, "_merged")),
        inference_overhead_merged_noise=_over(runs, lambda run: _noise(run.get("inference_overhead_merged_range"))),
        stored_bytes=None if stored is None else round(stored),
        bytes_for_ten_tasks=None if stored is None else TASKS * round(stored),
        swap_seconds=_mean(runs, "swap_seconds"),
        seeds=len(runs),
        seeds_failed=seeds_failed,
        loss=judged.get("mean", _mean(runs, "judged_loss") or loss),
        loss_low=judged.get("low"),
        loss_high=judged.get("high"),
        loss_seed_sd=judged.get("seed_sd"),
        forgetting_low=kept.get("low"),
        forgetting_high=kept.get("high"),
        predicted_memory_bytes=next(
            (found for run in runs if (found := (run.get("predicted_memory_bytes") or {}).get(PREDICTED_KEY))), None
        ),
        memory_prediction_source=first.get("memory_prediction_source"),
        inference_overhead_16=_over(runs, lambda run: _batch_16(run).get("overhead")),
        inference_overhead_16_noise=_over(runs, lambda run: _noise(_batch_16(run).get("overhead_range"))),
        inference_overhead_16_merged=_over(runs, lambda run: _batch_16(run).get("overhead_merged")),
        inference_overhead_16_merged_noise=_over(runs, lambda run: _noise(_batch_16(run).get("overhead_merged_range"))),
        metrics=metrics,
        metric_intervals={key: bounds for key in metrics if (bounds := _metric_interval(comparison, key, name))},
    )


def _arm(verdict: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """What a verdict says of one arm; empty where it says nothing."""
    arms = (verdict or {}).get("arms") or ()
    return next((arm for arm in arms if arm["name"] == name), {})


def _metric_interval(comparison: Mapping[str, Any], metric: str, name: str) -> tuple[float, float] | None:
    arm = _arm(((comparison.get("verdict") or {}).get("metrics") or {}).get(metric), name)
    low, high = arm.get("low"), arm.get("high")
    return None if low is None or high is None else (low, high)


def _metric_keys(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.get("metrics") or {}))


def _over(runs: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]) -> float | None:
    """Mean over the runs that have the value; None where none has."""
    found = [v for run in runs if (v := value(run)) is not None]
    return found[0] if len(found) == 1 else sum(found) / len(found) if found else None


def _mean(runs: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return _over(runs, lambda run: run.get(key))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _batch_16(run: Mapping[str, Any]) -> Mapping[str, Any]:
    return (run.get("decode") or {}).get("16") or {}


def _overhead(run: Mapping[str, Any], base: Mapping[str, Any], which: str = "") -> float | None:
    """Extra time for each decoded token at batch 1, as a share of the bare base's. `which`: "_merged" or nothing.

    The median over rounds in which both were timed in turn, as its noise is; where that was not kept, of both speeds.
    """
    paired = ((run.get("decode") or {}).get("1") or {}).get(f"overhead{which}")
    if paired is not None:
        return float(paired)
    bare = run.get("decode_tokens_per_second_base") or base.get("decode_tokens_per_second")
    rate = run.get(f"decode_tokens_per_second{which}")
    return None if bare is None or rate is None else bare / rate - 1


def _noise(found: Sequence[float] | None) -> float | None:
    """Half the width of the middle half of the rounds in which an overhead was measured."""
    return None if found is None else (found[1] - found[0]) / 2
