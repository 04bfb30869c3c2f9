"""docs/results/<task>.{md,json,html} from the run folders of `comparisons.py`; every sentence follows from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verdicts import curve, listed, mean, versus_full

#: cost fields of a run: taken from the runs that had a GPU to themselves
COST_FIELDS = (
    "peak_memory_bytes",
    "predicted_memory_bytes",
    "memory_prediction_source",
    "train_tokens_per_second",
    "decode",
    "inference_overhead_range",
    "inference_overhead_merged_range",
    "swap_seconds",
    *(f"decode_tokens_per_second{which}{what}" for which in ("", "_base", "_merged") for what in ("", "_spread")),
)


def write_page(name: str, task: Any, folder: Path, costs: Path, cost_steps: int, out: Path) -> None:
    """The page of one comparison. Rows and weights are not published.

    Args:
        task: its entry in `comparisons.TASKS`.
        folder: the whole comparison, merged.
        costs: where the comparisons that only measure cost lie; those were made on E2E's rows, and count there only.
    """
    from spectune.comparing import Comparison
    from spectune.comparing.advising.recommend import recommend
    from spectune.reporting import write_reports
    from spectune.reporting.tables import comparison_markdown
    from spectune.results import ComparisonResult

    content = Comparison.from_runs(folder).content
    content["base"]["name"] = Path(content["base"]["name"]).name
    files = costs.glob("*/comparison.json") if name == "e2e" else ()
    alone = {cost["name"]: cost for file in files for cost in json.loads(file.read_text())["runs"]}
    for found in content["runs"]:
        cost = alone.get(found["name"], {})
        found.update({field: cost.get(field, {} if field.endswith("memory_bytes") else None) for field in COST_FIELDS})
        # minutes of a run among others say nothing: steps at the speed that was measured alone
        found["train_seconds"] = found["train_tokens"] / cost["train_tokens_per_second"] if cost else None
    result = ComparisonResult.model_validate(content)
    result.recommendation = recommend(result)
    write_reports(result, folder)
    content = result.to_dict()
    lines = [
        f"# {task.title}",
        "",
        f"Base {content['base']['name']}, {content['data']['train_rows']:,} training rows, "
        f"{content['data']['valid_rows']:,} for validation. {task.note} The same for every method: "
        f"{_settings(content, task.settings)}.",
        "",
        comparison_markdown(result).strip(),
        "",
        *data_curve(content, task.curve_methods),
        *(beside_published(content) if name == "e2e" else ()),
        *_how(content, name, cost_steps, bool(alone)),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    for found in content["runs"]:
        found["forgetting_by_passage"] = None
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shutil.copy(folder / "report.html", out / f"{name}.html")


def _settings(content: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    """As the runs had them, not as they were meant."""
    had = content["settings"]
    text = ", ".join(f"{key} {had[key]!r}" if key != "separator" else _separator(had[key]) for key in names)
    return text


def _separator(separator: str) -> str:
    if separator == "\\n":
        return "separator a backslash and an n (two characters: a line break was meant, and quoted wrongly)"
    return f"separator {separator!r}"


def _how(content: Mapping[str, Any], name: str, cost_steps: int, costs: bool) -> list[str]:
    environment = content["environment"]
    versions = ", ".join(f"{package} {version}" for package, version in environment["packages"].items())
    text = (
        f"{environment['device']}, {content['base']['dtype']} with TF32 products, {versions}, spectune "
        f"{environment['spectune']}. Losses and metrics: all methods at the same time, each in processes of its own. "
    )
    if costs:
        text += (
            f"Memory and speed: {cost_steps} steps, one method after another with a GPU to itself; training time is "
            f"the steps at that speed. {_errors_of_memory(content)}{_noise_of_decoding(content)}"
        )
    else:
        text += "Memory and speed were measured on E2E's rows alone ([e2e.md](e2e.md)). "
    text += (
        "Made by `python benchmarks/comparisons.py run` and `pages`; "
        f"[{name}.json]({name}.json) has the numbers, [{name}.html]({name}.html) is the page."
    )
    return ["## How it was measured", "", text, ""]


def _errors_of_memory(content: Mapping[str, Any]) -> str:
    """What made the predictions of these runs wrong, where they were."""
    errors = [
        run["predicted_memory_bytes"]["peak_allocated"] / run["peak_memory_bytes"]["train_allocated"] - 1
        for run in content["runs"]
        if run["predicted_memory_bytes"] and run["peak_memory_bytes"]
    ]
    if not errors or max(map(abs, errors)) < 0.05:
        return ""
    return (
        f"Predicted memory is {100 * min(errors):+.0f}% to {100 * max(errors):+.0f}% off: the planner took the "
        "gradient of the logits to be made twice, and logits to be made of columns that hold no target (without both, "
        "the same planner is within 1%). And what was measured of prefix tuning, LoRA and DoRA holds, by all signs, a "
        "merged copy of full fine-tuning's weights (0.11 GB), which ran before them in their process. "
    )


def _noise_of_decoding(content: Mapping[str, Any]) -> str:
    """How far merged models, which run the base's own operations, were measured to be from it."""
    noise = merged_overheads(content)
    if not noise:
        return ""
    parts = [f"{100 * min(found):+.0f}% to {100 * max(found):+.0f}% at batch {batch}" for batch, found in noise.items()]
    return (
        "Decoding a base this small is a matter of starting kernels, and its times scatter: merged models, which do "
        f"what the bare base does, took {listed(parts)}. Overheads within that say nothing. "
    )


def merged_overheads(content: Mapping[str, Any]) -> dict[str, list[float]]:
    """Batch -> the overheads of all merged models: what noise looks like."""
    found: dict[str, list[float]] = {}
    for run in content["runs"]:
        for batch, at in (run.get("decode") or {}).items():
            if at.get("overhead_merged") is not None:
                found.setdefault(batch, []).append(at["overhead_merged"])
    return found


def data_curve(content: Mapping[str, Any], wanted: Sequence[str]) -> list[str]:
    """Validation loss by method and number of rows; and how far the last weights are above the best ones."""
    table = curve(content)
    if not table:
        return []
    labels = {arm["name"]: arm["label"] for arm in content["arms"]}
    planned = [rows for rows, _ in content["preset"]["curve"]]
    counts = sorted({rows for points in table.values() for rows in points} | set(planned))
    head = "| method | " + " | ".join(f"{count:,} rows" for count in counts) + " |"
    lines = ["## Validation loss by number of rows", "", head, "|---|" + "---:|" * len(counts)]
    for arm in (name for name in labels if name in table):
        cells, points = [], table[arm]
        for count in counts:
            at = points.get(count)
            rise = f" (+{at.last - at.best:.3f})" if at and at.last - at.best > 0.0005 else ""
            cells.append(f"{at.best:.3f}{rise}" if at else "-")
        lines.append(f"| {labels[arm]} | {' | '.join(cells)} |")
    text = (
        f"{_seeds(table)} At the rate found on all rows; at most 20 passes over the rows and never more steps than "
        "with all of them; validated five times, the best weights count. In brackets: how much higher the loss was "
        "after the last step."
    )
    there = {(run["name"], run["rows"]) for run in content["curves"]}
    missing = {arm: [c for c in planned if (arm, c) not in there] for arm in wanted if arm in labels}
    gaps = [f"{labels[arm]} on {listed([f'{c:,}' for c in found])} rows" for arm, found in missing.items() if found]
    return [*lines, "", text + (f" Not measured: {'; '.join(gaps)}." if gaps else ""), ""]


def _seeds(table: Mapping[str, Mapping[int, Any]]) -> str:
    """How many seeds the points have."""
    most = max(rows for points in table.values() for rows in points)
    parts = []
    for words, chosen in (
        ("Points on fewer rows", lambda rows: rows != most),
        (f"{'points' if len(table) > 1 else 'the point'} on all {most:,}", lambda rows: rows == most),
    ):
        counts = sorted({at.seeds for points in table.values() for rows, at in points.items() if chosen(rows)})
        if counts:
            number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            parts.append(f"{words} are of {number} seed{'s' if counts[-1] > 1 else ''}")
    return ", ".join(parts) + "."


#: rows of the LoRA paper's table 3 (Hu et al. 2021): label, the method here, trained weights, BLEU, ROUGE-L
TABLE_3 = (
    ("full", "full", "354.92M", 68.2, 71.0),
    ("adapter (Adapter-L)", "adapter", "11.09M", 68.9, 71.3),
    ("adapter (Adapter-L)", "adapter", "0.37M", 66.3, 69.8),
    ("adapter (Adapter-H)", "adapter", "11.09M", 67.3, 70.7),
    ("prefix (PreLayer)", "prefix", "0.35M", 69.7, 71.4),
    ("LoRA", "lora", "0.35M", 70.4, 71.8),
)
FULL_BLEU = TABLE_3[0][3]
PUBLISHED = ("lora", "prefix", "adapter")


def beside_published(content: Mapping[str, Any]) -> list[str]:
    """The published table, and what of it is found here."""
    lines = [
        "## Beside the published numbers",
        "",
        "GPT-2 medium (355M), BLEU and ROUGE-L on the same test set, as the LoRA paper's table 3 gives them (beam "
        "search; its authors' recipe, run again by others, gave BLEU 68.7 to 68.9 for LoRA):",
        "",
        "| method | trained weights | BLEU | ROUGE-L |",
        "|---|---:|---:|---:|",
        *(f"| {label} | {weights} | {bleu} | {rouge} |" for label, _, weights, bleu, rouge in TABLE_3),
        "",
    ]
    bleu = content["verdict"]["metrics"]["bleu"]
    here = versus_full(bleu)
    published = {method: max((row[3], row[2]) for row in TABLE_3 if row[1] == method) for method in PUBLISHED}
    agree, differ = [], []
    for method in (method for method in published if method in here):
        arm, gap = here[method], published[method][0] - FULL_BLEU
        where = "above" if gap > 0 else "below"
        there = f"{abs(gap):.1f} {where} full fine-tuning there with {published[method][1]} weights"
        inside = arm.level == (gap >= 0)
        interval = f"{arm.difference:+.1f}, {arm.low:+.1f} to {arm.high:+.1f}"
        word = {"no difference": "level with it here", "worse": "worse here", "better": "better here"}[arm.word]
        (agree if inside else differ).append(f"{arm.label} ({there}, {word}: {interval})")
    text = f"BLEU against full fine-tuning, with 95% intervals. What agrees: {'; '.join(agree) or 'nothing'}. "
    text += f"What does not: {'; '.join(differ) or 'nothing'}. "
    if agree:
        text += "No interval here is narrow enough to see the one or two BLEU by which the paper's methods differ. " * (
            all(here[name].high - here[name].low > 4 for name in published if name in here)
        )
    return [*lines, text.strip(), "", *_further(content, bleu), ""]


def _further(content: Mapping[str, Any], bleu: Mapping[str, Any]) -> list[str]:
    """What the table has nothing on: losses, methods that are not in it; and why the levels are not to be compared."""
    loss, rouge = versus_full(content["verdict"]), versus_full(content["verdict"]["metrics"]["rouge_l"])
    written = versus_full(bleu)
    level = [arm.label for name, arm in written.items() if arm.level and rouge[name].level]
    text = f"Level with full fine-tuning in BLEU and ROUGE-L within noise, or better: {listed(level) or 'none'}. "
    apart = [arm.label for name, arm in loss.items() if not arm.level and written[name].level and rouge[name].level]
    if apart:
        text += f"In loss, of which the paper has nothing, {listed(apart)} {'is' if len(apart) == 1 else 'are'} worse. "
    if "prompt" in written:
        prompt = written["prompt"]
        text += (
            "Prompt tuning is not in that table; Lester et al. (2021) find it level with full fine-tuning only as "
            "bases exceed some billion weights, and here it is "
            + ("level with it. " if prompt.level else f"{-prompt.difference:.0f} BLEU behind. ")
        )
    text += (
        f"Full fine-tuning itself has BLEU {mean(bleu, 'full'):.1f} here and {FULL_BLEU} there: the base here is 13 "
        "times smaller and decoding is greedy, so the levels are not to be compared."
    )
    return [text]
