"""What a comparison found, in sentences: the verdict, the recommendation, and what a reader must know."""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from spectune.files.plain_text import markdown_code
from spectune.reporting import units
from spectune.reporting.columns import metric_title
from spectune.results import ComparisonResult, Recommendation, Verdict
from spectune.results.arm_result import arm_results, holds_a_device, training_memory, why_no_relative_performance
from spectune.results.comparison_file import Preset
from spectune.results.phrases import listed
from spectune.results.recommendation import AXES

#: runs behind a sentence that are named one by one: the seeds of an arm
NAMED = 3


def verdict_sentences(comparison: ComparisonResult) -> list[str]:
    """The verdict in words, its headline first; none where a comparison carries no verdict."""
    return [] if comparison.verdict is None else comparison.verdict.sentences


def metric_sentences(comparison: ComparisonResult) -> list[str]:
    """The headline of each task metric, and of forgetting, each with its name before it."""
    verdict = comparison.verdict or Verdict()
    parts = {metric_title(name): part for name, part in verdict.metrics.items()}
    if verdict.forgetting is not None:
        parts["Forgetting"] = verdict.forgetting
    return [f"{name}: {part.sentences[0]}" for name, part in parts.items() if part.sentences]


def recommendation_sentence(comparison: ComparisonResult) -> str | None:
    """The pick, or why there is none; None where nothing was recommended."""
    found = comparison.recommendation or Recommendation()
    if found.pick is not None:
        return f"We would pick {comparison.label_of(found.pick)}."
    return None if found.abstains is None else f"No pick: {found.abstains}"


def recommendation_reasons(comparison: ComparisonResult) -> list[tuple[str, list[str]]]:
    """Why the pick, then why not the excluded ones: (sentence, the runs that prove it)."""
    found = comparison.recommendation or Recommendation()
    return [(reason.text, reason.runs) for reason in [*found.reasons, *found.excluded]]


def evidence(runs: Sequence[str], comparison: ComparisonResult) -> str:
    """The runs that prove a sentence, as Markdown: each by name where they are few, else the folders that hold them."""
    runs = list(dict.fromkeys(runs))
    if len(runs) <= NAMED:
        return ", ".join(map(markdown_code, runs))
    if len(runs) == len(comparison.runs):
        return f"all {len(runs)} runs in `runs/`"
    places = map(PurePosixPath, runs)
    counts = Counter((place.parent if place.suffix == ".jsonl" else place).parent for place in places)
    same = len(set(counts.values())) == 1
    folders = [markdown_code(f"{folder}/") + ("" if same else f" ({count})") for folder, count in counts.items()]
    return f"{len(runs)} runs in {', '.join(folders)}"


def recommendation_context(comparison: ComparisonResult) -> list[str]:
    """Between which arms there was a choice, and under which limits."""
    found = comparison.recommendation or Recommendation()
    lines = []
    if front := [comparison.label_of(name) for name in found.pareto]:
        titles = {name: axis.title for name, axis in AXES.items()}
        if not comparison.decided_by_loss:
            titles[next(iter(AXES))] = metric_title(comparison.data.decided_by).lower()
        axes = listed([titles.get(axis, axis) for axis in found.axes])
        where = f", in {axes}" if axes else ""
        lines.append(f"Not beaten in everything by another (the Pareto set{where}): {listed(front)}.")
    if limits := found.limits.model_dump(exclude_unset=True, exclude_none=True):
        form = {"bytes": units.size, "overhead": units.percent}
        words = {key: key.replace("_", " ").removesuffix(" bytes") for key in limits}
        given = [f"{words[key]} {form.get(key.rpartition('_')[2], str)(value)}" for key, value in limits.items()]
        lines.append(f"Limits given: {listed(given)}.")
    return lines


def failure_lines(comparison: ComparisonResult) -> list[str]:
    """Each reason once for the seeds of an arm that it stopped."""
    labels, stopped = comparison.labels, dict[tuple[str, str], list[str]]()
    for failure in comparison.failed:
        seeds = stopped.setdefault((labels[failure.name], failure.reason), [])
        seeds += [] if failure.seed is None else [str(failure.seed)]
    lines = []
    for (label, reason), seeds in stopped.items():
        which = f" (seed{'s' if len(seeds) > 1 else ''} {listed(seeds)})" if seeds else ""
        lines.append(f"{label}{which} failed: {reason}")
    return lines


def changed_sentence(comparison: ComparisonResult) -> str | None:
    """Which files were changed after they were written; None where none was."""
    if not comparison.changed:
        return None
    return (
        "Changed or damaged after it was written, and shown here as it is, so that these numbers may not be those that "
        f"were measured: {'; '.join(comparison.changed)}."
    )


def notes(comparison: ComparisonResult) -> list[str]:
    """What a reader must know to read the tables right."""
    data, base = comparison.data, comparison.base
    why = why_no_relative_performance(comparison)
    verdict = comparison.verdict or Verdict()
    rows = "test" if data.judged_on == "test" else "validation"
    judged = f"{data.valid_rows:,}" if data.judged_rows is None else f"{data.judged_rows:,} {rows}"
    changed = changed_sentence(comparison)
    found = [changed] if changed is not None else []
    found += _budget(comparison.preset, searched=bool(comparison.searches))
    found += [f"Trained on {data.mixture}."] if data.mixture else []
    found += [_meaning_of_intervals(verdict)] if verdict.arms else []
    if comparison.decided_by_loss:
        relative = f"Relative perf.: 100 x (base - method) / (base - full) of {rows} loss"
        found.append(
            relative + (f"; undefined here: {why}." if why else "; 0 is the bare base, 100 is full fine-tuning.")
        )
    losses = f"Losses are {data.loss_unit} on {judged} rows."
    if not comparison.decided_by_loss:
        losses = (
            f"Own loss: nats per target token of the label's words, or nats per row of a head, on {judged} rows; these "
            f"do not compare, and the arms are ordered by {metric_title(data.decided_by).lower()}."
        )
    if comparison.has_text:
        losses += " Forgetting: mean KL(base || tuned), nats per token, on "
        losses += f"{data.retained_passages} passages ({data.retained_from})."
    found.append(losses)
    if any(arm.task_type != "CAUSAL_LM" for arm in comparison.arms):
        found.append(
            "A head writes no text and has no vocabulary: it has no perplexity, no forgetting (a divergence of next "
            "words), and no decoding speed. It begins untrained, which is what an untrained head's numbers are."
        )
    if any(training_memory(run) for run in comparison.runs):
        what = "what is held of the device" if any(map(holds_a_device, comparison.runs)) else "tensors"
        found.append(f"Memory: peak of {what} in training ({base.device}, {base.dtype}).")
    if most := max((run.trained_together for run in comparison.runs if run.shared), default=0):
        found.append(
            f"Up to {most} runs shared a pass. Memory and speed of training are those of some steps that each arm took "
            "by itself, and its time is its tokens at that speed."
        )
    if any(run.decode_tokens_per_second for run in comparison.runs):
        found.append(
            "Inference overhead: time for each decoded token at batch 1 against the bare base, unmerged / merged; ± is "
            "half of what it ranged over in rounds in which both were timed in turn, and not less than the merged "
            "models, which run the base's own operations, were off the base."
        )
    if (busy := _busy(comparison)) is not None:
        found.append(busy)
    if not verdict.arms:
        found.append(
            "One seed and one learning rate for each method: differences of a few per cent may be noise or tuning."
            if not comparison.searches
            else "No verdict: nothing here says which differences are larger than noise."
        )
    return found


def _busy(comparison: ComparisonResult) -> str | None:
    """Which times were taken on a busy machine; None where none was."""
    arms = arm_results(comparison)
    training, decoding = (
        [arm.label for arm in arms if getattr(arm, f"busy_in_{what}")] for what in ("training", "decoding")
    )
    if not training and not decoding:
        return None
    loads = [load for run in comparison.runs for load in run.machine_load.values() if load.busy]
    shares = [load.ran_share for load in loads if load.ran_share is not None]
    seen = [f"this process had {units.percent(min(shares))} of the time that it could have run"] if shares else []
    crowds = [(load.load_average, load.cores) for load in loads if load.load_average is not None]
    if crowds:
        average, cores = max(crowds, key=lambda crowd: crowd[0])
        seen.append(f"the load average was {average:.1f} on {cores} cores")
    timed = [f"{what} of {listed(who)}" for what, who in (("training", training), ("decoding", decoding)) if who]
    return (
        f"~ marks times that are no facts: the machine was busy with other work in {' and in '.join(timed)} (at worst "
        f"{listed(seen)}). The recommendation does not use them; run the comparison on a quiet machine to know them."
    )


def _meaning_of_intervals(verdict: Verdict) -> str:
    level = f"{100 * verdict.confidence:.3g}%"
    what = (
        f"the choice of rows and the noise of training ({verdict.seeds or 1} seeds)"
        if verdict.covers_training_noise
        else "the choice of rows, not the noise of training: another seed may order close methods differently"
    )
    tests = f" Differences are tested in pairs on the same rows, corrected for their number ({verdict.correction})."
    covered = f"± is half the width of a {level} interval, which covers {what}."
    return covered + tests if verdict.correction else covered


def _budget(preset: Preset, *, searched: bool) -> list[str]:
    if not preset.name:
        return []
    text = f"Budget ({preset.name}): "
    if preset.rungs and searched:
        steps = ", then ".join(f"{tried} at {units.percent(share)}" for tried, share in preset.rungs)
        text += f"learning rates searched by successive halving, {steps} of the final steps; "
    seeds = len(preset.seeds) or 1
    text += f"{seeds} final run{'s' if seeds > 1 else ''} of each method"
    text += f", {preset.final_steps:,} steps each" if preset.final_steps else ""
    if tokens := preset.total_target_tokens:
        text += f"; {units.count(tokens)} target tokens in all, in equal parts for every method"
    return [f"{text}."]
