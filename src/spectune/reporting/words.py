"""What a comparison found, in sentences: the verdict, the recommendation, and what a reader must know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from spectune.reporting import units
from spectune.reporting.arms import arm_labels, failures
from spectune.reporting.columns import metric_title
from spectune.reporting.rows import MEMORY_KEY, why_no_relative_performance

#: what the axes of the Pareto set are called
AXES = {
    "judged_loss": "loss",
    "train_memory_bytes": "memory in training",
    "stored_bytes": "stored size",
    "inference_overhead": "inference overhead",
    "train_seconds": "training time",
}

#: runs behind a sentence that are named one by one: the seeds of an arm
NAMED = 3


def verdict_sentences(comparison: Mapping[str, Any]) -> list[str]:
    """The verdict in words, its headline first; none where a comparison carries no verdict."""
    return [str(sentence) for sentence in (comparison.get("verdict") or {}).get("sentences") or ()]


def metric_sentences(comparison: Mapping[str, Any]) -> list[str]:
    """The headline of each task metric, and of forgetting, each with its name before it."""
    verdict = comparison.get("verdict") or {}
    parts = {metric_title(name): part for name, part in (verdict.get("metrics") or {}).items()}
    parts["Forgetting"] = verdict.get("forgetting") or {}
    return [f"{name}: {part['sentences'][0]}" for name, part in parts.items() if part.get("sentences")]


def recommendation_sentence(comparison: Mapping[str, Any]) -> str | None:
    """The pick, or why there is none; None where nothing was recommended."""
    found = comparison.get("recommendation") or {}
    pick = found.get("pick")
    if pick is not None:
        return f"We would pick {label_of(pick, comparison)}."
    return None if found.get("abstains") is None else f"No pick: {found['abstains']}"


def recommendation_reasons(comparison: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Why the pick, then why not the excluded ones: (sentence, the runs that prove it)."""
    found = comparison.get("recommendation") or {}
    return [
        (str(reason["text"]), [str(run) for run in reason.get("runs") or ()])
        for reason in [*(found.get("reasons") or ()), *(found.get("excluded") or ())]
    ]


def evidence(runs: Sequence[str], comparison: Mapping[str, Any]) -> str:
    """The runs that prove a sentence, as Markdown: each by name where they are few, else the folders that hold them."""
    runs = list(dict.fromkeys(runs))
    if len(runs) <= NAMED:
        return ", ".join(f"`{run}`" for run in runs)
    if len(runs) == len(comparison["runs"]):
        return f"all {len(runs)} runs in `runs/`"
    counts: dict[str, int] = {}
    for run in runs:
        place = PurePosixPath(run)
        folder = str((place.parent if place.suffix == ".jsonl" else place).parent)
        counts[folder] = counts.get(folder, 0) + 1
    same = len(set(counts.values())) == 1
    folders = ", ".join(f"`{folder}/`" + ("" if same else f" ({count})") for folder, count in counts.items())
    return f"{len(runs)} runs in {folders}"


def recommendation_context(comparison: Mapping[str, Any]) -> list[str]:
    """Between which arms there was a choice, and under which limits."""
    found = comparison.get("recommendation") or {}
    lines = []
    front = [label_of(name, comparison) for name in found.get("pareto") or ()]
    if front:
        axes = joined([AXES.get(axis, axis) for axis in found.get("axes") or ()])
        lines.append(
            f"Not beaten in everything by another (the Pareto set{f', in {axes}' if axes else ''}): {joined(front)}."
        )
    limits = {key: value for key, value in (found.get("limits") or {}).items() if value is not None}
    if limits:
        given = [
            f"{key.replace('_', ' ').removesuffix(' bytes')} {_limit(key, value)}" for key, value in limits.items()
        ]
        lines.append(f"Limits given: {joined(given)}.")
    return lines


def _limit(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return units.size(value)
    return units.percent(value) if key.endswith("_overhead") else str(value)


def label_of(name: str, comparison: Mapping[str, Any]) -> str:
    return arm_labels(comparison).get(name, name)


def failure_lines(comparison: Mapping[str, Any]) -> list[str]:
    """Each reason once for the seeds of an arm that it stopped."""
    stopped: dict[tuple[str, str], list[int]] = {}
    for failure in failures(comparison):
        seeds = stopped.setdefault((failure.label, failure.reason), [])
        seeds += [] if failure.seed is None else [failure.seed]
    return [f"{label}{_seeds(seeds)} failed: {reason}" for (label, reason), seeds in stopped.items()]


def _seeds(seeds: Sequence[int]) -> str:
    return f" (seed{'s' if len(seeds) > 1 else ''} {joined([str(seed) for seed in seeds])})" if seeds else ""


def notes(comparison: Mapping[str, Any]) -> list[str]:
    """What a reader must know to read the tables right."""
    data, base = comparison["data"], comparison["base"]
    why = why_no_relative_performance(comparison)
    verdict = comparison.get("verdict") or {}
    found = [*_budget(comparison)]
    found += [_covered(verdict)] if verdict.get("arms") else []
    found += [
        "Relative perf.: 100 x (base - method) / (base - full) of validation loss"
        + (f"; undefined here: {why}." if why else "; 0 is the bare base, 100 is full fine-tuning."),
        f"Losses are nats per target token on {_judged_rows(data)} rows. Forgetting: mean KL(base || tuned), nats "
        f"per token, on {data['retained_passages']} passages ({data['retained_from']}).",
    ]
    runs = comparison["runs"]
    if any(run["peak_memory_bytes"].get(MEMORY_KEY) for run in runs):
        found.append(f"Memory: peak of tensors in a training step ({base['device']}, {base['dtype']}).")
    if any(run.get("decode_tokens_per_second") for run in runs):
        found.append(
            "Inference overhead: time for each decoded token at batch 1 against the bare base, unmerged / merged; ± is "
            "half the interquartile range over rounds in which both were timed in turn."
        )
    if not verdict.get("arms"):
        found.append(
            "One seed and one learning rate for each method: differences of a few per cent may be noise or tuning."
            if not comparison.get("searches")
            else "No verdict: nothing here says which differences are larger than noise."
        )
    return found


def _judged_rows(data: Mapping[str, Any]) -> str:
    rows = data.get("judged_rows")
    if rows is None:
        return f"{data['valid_rows']:,}"
    return f"{rows:,} {'test' if data.get('judged_on') == 'test' else 'validation'}"


def _covered(verdict: Mapping[str, Any]) -> str:
    level = f"{100 * (verdict.get('confidence') or 0.95):.3g}%"
    seeds = verdict.get("seeds") or 1
    what = (
        f"the choice of rows and the noise of training ({seeds} seeds)"
        if verdict.get("covers_training_noise")
        else "the choice of rows, not the noise of training: another seed may order close methods differently"
    )
    correction = verdict.get("correction")
    tests = f" Differences are tested in pairs on the same rows, corrected for their number ({correction})." * bool(
        correction
    )
    return f"± is half the width of a {level} interval, which covers {what}.{tests}"


def _budget(comparison: Mapping[str, Any]) -> list[str]:
    preset = comparison.get("preset")
    if not preset:
        return []
    parts = [f"Budget ({preset['name']}): "]
    rungs = preset.get("rungs") or ()
    if rungs and comparison.get("searches"):
        steps = ", then ".join(f"{tried} at {units.percent(share)}" for tried, share in rungs)
        parts.append(f"learning rates searched by successive halving, {steps} of the final steps; ")
    seeds = len(preset.get("seeds") or ()) or 1
    parts.append(f"{seeds} final run{'s' if seeds > 1 else ''} of each method")
    if preset.get("final_steps"):
        parts.append(f", {preset['final_steps']:,} steps each")
    if preset.get("total_target_tokens"):
        parts.append(
            f"; {units.count(preset['total_target_tokens'])} target tokens in all, in equal parts for every method"
        )
    return ["".join(parts) + "."]


def joined(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
