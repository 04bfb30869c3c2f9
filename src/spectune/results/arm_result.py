"""The numbers of each arm, computed once: terminal, Markdown, CSV, page, figures and recommendation have these."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeGuard, TypeVar

from spectune.results.comparison_file import ComparedRun, ComparisonResult, Decoding
from spectune.results.verdict_record import JudgedArm, Judgement, Verdict

FULL = "full"
TASKS = 10
#: fields that are as in the first run of an arm, and, with what they are of a run, those that are means over its runs
OF_FIRST = ("trainable_parameters", "stored_parameters", "learning_rate", "memory_prediction_source")
MEANS = {
    "train_loss": "train_loss", "valid_loss": "valid_loss",
    "forgetting_kl_nats_per_token": "forgetting_kl_nats_per_token",
    "train_tokens_per_second": "own_tokens_per_second", "train_seconds": "own_train_seconds",
    "decode_tokens_per_second": "decode_tokens_per_second", "swap_seconds": "swap_seconds",
}  # fmt: skip
T = TypeVar("T")


@dataclass(frozen=True)
class ArmResult:
    """One arm, a line of `comparison.csv`: its runs over seeds as one. Shares are of the base's weights; None is "not
    measured" or "not defined", never zero.

    Numbers are means over the seeds that ended, except: `train_memory_bytes` is the largest peak, `valid_perplexity`
    the exponential of the mean loss, and an overhead's noise the mean of the runs', at least the `noise_floor`. `loss`
    is of the judged rows, in the comparison's `loss_unit`: what the verdict ranks by, with its interval `loss_low` to
    `loss_high` where there is a verdict; where a metric decides, losses are of different things and have no interval.
    `relative_performance` is of that loss. `loss_by_source`: the judged loss on the rows of each source. `task_type`:
    what the arm learns of the rows. `busy_in_training` and `busy_in_decoding`: the machine did other work while a run
    of it was timed, so that its times there are no facts. One run is shown as it is.
    """

    name: str
    method: str
    label: str
    best_for: str
    task_type: str = "CAUSAL_LM"
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
    loss_by_source: Mapping[str, float] = field(default_factory=dict)
    busy_in_training: bool = False
    busy_in_decoding: bool = False

    @property
    def loss_interval(self) -> tuple[float, float] | None:
        return _interval(self.loss_low, self.loss_high)

    @property
    def forgetting_interval(self) -> tuple[float, float] | None:
        return _interval(self.forgetting_low, self.forgetting_high)


#: the fields that are one number or word each; metrics and sources have names of their own
PLAIN = tuple(f.name for f in fields(ArmResult) if f.name not in ("metrics", "metric_intervals", "loss_by_source"))


def arm_results(comparison: ComparisonResult) -> list[ArmResult]:
    """Each arm with a run that ended, in the comparison's order; then the arms of which none did."""
    labels, runs_by_arm = comparison.labels, comparison.runs_by_arm
    full = _full(runs_by_arm)
    failed = [failure.name for failure in comparison.failed]
    found = [
        ArmResult(
            name=name, method=runs[0].method, label=labels[name], best_for=runs[0].best_for,
            task_type=runs[0].task_type,
            seeds=len(runs), seeds_failed=failed.count(name),
            **_plain(runs), **_quality(runs, full, comparison), **_costs(runs, full, comparison),
        )
        for name, runs in runs_by_arm.items()
    ]  # fmt: skip
    best_for = {arm.name: arm.best_for for arm in reversed(comparison.arms)}
    for name in dict.fromkeys(name for name in failed if name not in runs_by_arm):
        reasons = "; ".join(dict.fromkeys(failure.reason for failure in comparison.failed if failure.name == name))
        known = ArmResult(name, method_of(name, comparison), labels[name], best_for.get(name, ""))
        found.append(replace(known, failed=reasons, seeds_failed=failed.count(name)))
    return found


def relative_performance(base: float | None, full: float | None, loss: float | None) -> float | None:
    """`100 (base - method) / (base - full)` of judged losses: 0 is the bare base, 100 is full fine-tuning. None where
    full fine-tuning did not improve on the base, or was not run."""
    if base is None or full is None or loss is None or not all(map(math.isfinite, (base, full, loss))) or full >= base:
        return None
    return 100 * (base - loss) / (base - full)


def why_no_relative_performance(comparison: ComparisonResult) -> str | None:
    """The reason why relative performance is undefined in a comparison, None where it is defined."""
    if not comparison.decided_by_loss:
        return "losses of label words and of heads do not compare"
    if not (full := _full(comparison.runs_by_arm)):
        return "full fine-tuning was not run, or failed"
    loss = _loss(full, comparison)
    defined = relative_performance(base_loss(comparison), loss, loss) is not None
    return None if defined else "full fine-tuning did not improve on the base"


def base_loss(comparison: ComparisonResult) -> float | None:
    """The bare base's loss on the judged rows; None where it was not measured on them, or is not finite, or where no
    loss decides."""
    base = comparison.base
    if not comparison.decided_by_loss:
        return None
    found = [None if comparison.verdict is None else comparison.verdict.base, base.judged_loss]
    if comparison.data.judged_on == "valid":
        found += [base.valid_loss, mean(run.base_valid_loss for run in comparison.runs)]
    loss = next((loss for loss in found if loss is not None), None)
    return loss if is_finite(loss) else None


def overhead(
    run: ComparedRun, comparison: ComparisonResult, batch: int = 1, *, merged: bool = False
) -> tuple[float | None, tuple[float, float] | None]:
    """Extra time for each decoded token, as a share of the bare base's, and the ends of what it was over rounds.

    The median over rounds in which both were timed in turn; where that was not kept, of both speeds (batch 1 only).
    """
    at = (run.decode or {}).get(str(batch), Decoding())
    value = at.overhead_merged if merged else at.overhead
    ends = at.overhead_merged_range if merged else at.overhead_range
    if batch == 1:
        ends = ends or (run.inference_overhead_merged_range if merged else run.inference_overhead_range)
        rate = run.decode_tokens_per_second_merged if merged else run.decode_tokens_per_second
        bare = run.decode_tokens_per_second_base or comparison.base.decode_tokens_per_second
        if value is None and bare and rate:
            value = bare / rate - 1
    return value, ends


def peak_memory(run: ComparedRun) -> int | None:
    """The largest peak of all phases: reserved by the allocator where that was measured, else tensors."""
    for kind in ("_reserved", "_allocated"):
        if found := [value for key, value in run.peak_memory_bytes.items() if key.endswith(kind)]:
            return max(found)
    return None


def method_of(name: str, comparison: ComparisonResult) -> str:
    entries = [*comparison.arms, *comparison.failed]
    return next((entry.method for entry in entries if entry.name == name), name)


def metric_names(arms: Iterable[ArmResult]) -> list[str]:
    """Every task metric that some arm has, in the order in which they come."""
    return list(dict.fromkeys(name for arm in arms for name in arm.metrics))


def source_names(comparison: ComparisonResult) -> list[str]:
    """The sources of the judged rows, in the order in which they come; none where all rows are of one."""
    of_all = [comparison.base.judged_loss_by_source, *(run.judged_loss_by_source for run in comparison.runs)]
    return list(dict.fromkeys(name for found in of_all for name in found))


def base_loss_by_source(comparison: ComparisonResult) -> dict[str, float]:
    """The bare base's loss on the judged rows of each source, where it was measured and is finite."""
    return {name: loss for name, loss in comparison.base.judged_loss_by_source.items() if is_finite(loss)}


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there; None where none is."""
    found = [value for value in values if value is not None]
    return found[0] if len(found) == 1 else sum(found) / len(found) if found else None


def is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def undominated(items: Sequence[T], beats: Callable[[T, T], bool]) -> list[T]:
    """The items that no other beats: with losses and costs, the Pareto front."""
    return [item for item in items if not any(beats(other, item) for other in items)]


def _full(runs_by_arm: Mapping[str, list[ComparedRun]]) -> list[ComparedRun]:
    """The runs of the first arm of full fine-tuning."""
    return next((runs for runs in runs_by_arm.values() if runs[0].method == FULL), [])


def _loss(runs: Sequence[ComparedRun], comparison: ComparisonResult) -> float | None:
    by_loss = comparison.verdict is not None and comparison.decided_by_loss and runs
    judged = comparison.verdict.arm(runs[0].name).mean if by_loss and comparison.verdict else None
    return mean(run.loss for run in runs) if judged is None else judged


def _plain(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Fields that are as in the first run, and means over all."""
    first, stored = runs[0], mean(run.stored_bytes for run in runs)
    trained, total = first.trainable_parameters, first.total_parameters
    return {
        **{name: getattr(first, name) for name in OF_FIRST},
        **{name: mean(getattr(run, own) for run in runs) for name, own in MEANS.items()},
        "trainable_share": trained / total if trained is not None and total else None,
        "stored_bytes": None if stored is None else round(stored),
        "bytes_for_ten_tasks": None if stored is None else TASKS * round(stored),
    }


def _quality(runs: Sequence[ComparedRun], full: Sequence[ComparedRun], comparison: ComparisonResult) -> dict[str, Any]:
    verdict, name = comparison.verdict or Verdict(), runs[0].name
    judged = verdict.arm(name) if comparison.decided_by_loss else JudgedArm(name=name)
    forgetting = (verdict.forgetting or Judgement()).arm(name)
    valid, loss = mean(run.valid_loss for run in runs), _loss(runs, comparison)
    names = dict.fromkeys(metric for run in runs for metric in run.metrics)
    means = {metric: mean(run.metrics.get(metric) for run in runs) for metric in names}
    metrics = {metric: value for metric, value in means.items() if value is not None}
    by_metric = {metric: verdict.metrics.get(metric, Judgement()).arm(name) for metric in metrics}
    if not comparison.decided_by_loss:
        by_metric[comparison.data.decided_by] = verdict.arm(name)
    intervals = {metric: _interval(arm.low, arm.high) for metric, arm in by_metric.items()}
    return {
        "valid_perplexity": runs[0].valid_perplexity if len(runs) == 1 or valid is None else _exp(valid),
        "relative_performance": relative_performance(base_loss(comparison), _loss(full, comparison), loss),
        "loss": loss,
        "loss_low": judged.low,
        "loss_high": judged.high,
        "loss_seed_sd": judged.seed_sd,
        "forgetting_low": forgetting.low,
        "forgetting_high": forgetting.high,
        "metrics": metrics,
        "loss_by_source": _by_source(runs),
        "metric_intervals": {metric: bounds for metric, bounds in intervals.items() if bounds is not None},
    }


def _by_source(runs: Sequence[ComparedRun]) -> dict[str, float]:
    names = dict.fromkeys(name for run in runs for name in run.judged_loss_by_source)
    means = {name: mean(run.judged_loss_by_source.get(name) for run in runs) for name in names}
    return {name: loss for name, loss in means.items() if loss is not None}


def _costs(runs: Sequence[ComparedRun], full: Sequence[ComparedRun], comparison: ComparisonResult) -> dict[str, Any]:
    speed, full_speed = (mean(run.own_tokens_per_second for run in of) for of in (runs, full))
    peaks = [peak for run in runs if (peak := training_memory(run))]
    predicted = [peak for run in runs if (peak := predicted_memory(run))]
    found: dict[str, Any] = {
        "train_memory_bytes": max(peaks, default=None),
        "predicted_memory_bytes": predicted[0] if predicted else None,
        "speed_to_full": None if speed is None or not full_speed or _busy(full, "train") else speed / full_speed,
    }
    for batch, at in ((1, ""), (16, "_16")):
        floor = noise_floor(comparison, batch)
        for merged, kind in ((False, ""), (True, "_merged")):
            measured = [overhead(run, comparison, batch, merged=merged) for run in runs]
            found[f"inference_overhead{at}{kind}"] = mean(value for value, _ in measured)
            # half of what the rounds range over, and never below what a base differs by from itself
            noise = mean((ends[1] - ends[0]) / 2 for _, ends in measured if ends is not None)
            found[f"inference_overhead{at}{kind}_noise"] = None if noise is None else max(noise, floor)
    for timed, where in (("train", "training"), ("decode", "decoding")):
        found[f"busy_in_{where}"] = _busy(runs, timed)
    return found


def holds_a_device(run: ComparedRun) -> bool:
    """Whether it was measured what the run held of a device, which is more than its tensors take."""
    return "train_reserved" in run.peak_memory_bytes


def training_memory(run: ComparedRun) -> int | None:
    """Bytes that have to fit where a run trains, at its peak: what torch's allocator held of the device, elsewhere
    tensors; None where it was not measured."""
    return run.peak_memory_bytes.get("train_reserved" if holds_a_device(run) else "train_allocated")


def predicted_memory(run: ComparedRun) -> int | None:
    """The prediction of `training_memory`."""
    return run.predicted_memory_bytes.get("peak_reserved" if holds_a_device(run) else "peak_allocated")


def noise_floor(comparison: ComparisonResult, batch: int = 1) -> float:
    """What decoding differs by where nothing differs: the most that a round of any merged model, which runs the base's
    own operations, was off the bare base, as a share of its time. 0 where none was timed."""
    ranges = [overhead(run, comparison, batch, merged=True)[1] for run in comparison.runs]
    return max((abs(end) for ends in ranges if ends is not None for end in ends), default=0.0)


def _busy(runs: Sequence[ComparedRun], timed: str) -> bool:
    loads = [run.machine_load.get(timed) for run in runs]
    return any(load is not None and load.busy for load in loads)


def _interval(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
