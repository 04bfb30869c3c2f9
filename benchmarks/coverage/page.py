"""docs/coverage.md from the results."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.coverage.checks import DEFECT, METHODS, REFUSED, WORKS
from benchmarks.coverage.driver import BASE_FAILS, versions
from benchmarks.coverage.reasons import REASONS, sort

#: a footnote for each thing that is so with the bare base too: how a result tells it, and what it says
_NOTES = (
    ("generate:", "as the base: its own cache, by itself, gives other logits than none, or fails"),
    ("padding on the left", "as the base: left padding, by itself, changes its logits (no `position_ids`, a state that "
     "runs over padding)"),
    ("padding on the right", "as the base: right padding, by itself, changes its logits"),
    ("get no gradient from a text", "as the base: parts of it are not for text, or only choose (towers for pictures, "
     "cross-attention, load balance), and text does not train them"),
    ("get no gradient from this", "a few of the method's tensors get no gradient, and the user is told so at attach"),
)  # fmt: skip


#: begins the page's last part, which `benchmarks.coverage.heads` writes
HEADS = "## Heads"


def write(rows: list[dict[str, Any]], page: Path) -> None:
    """Write the page of all results; its part on heads stays."""
    before = page.read_text() if page.exists() else ""
    heads = before[len(without_heads(before)) :]
    page.write_text("\n".join(_lines(rows)) + "\n" + (f"\n{heads}" if heads else ""))


def without_heads(text: str) -> str:
    """The page without its part on heads."""
    place = text.find(f"{HEADS}\n")
    return text if place < 0 else text[:place]


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    by_type: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row["type"]):
        by_type[row["type"]][row["method"]] = row
    methods = [m for m in METHODS if any(m in found for found in by_type.values())]
    lines = [
        "# Coverage",
        "",
        f"Every type of transformers' mapping of causal language models ({len(by_type)} in transformers "
        f"{versions()['transformers']}), built tiny with random weights, with every method. A cell that says *works* "
        "has passed all of: attach, with the base's logits bit for bit where the method starts there; two training "
        "steps after which the loss on the same batch is lower and every weight has moved; save, and load elsewhere "
        "with the same logits, bit for bit; 4 tokens from `generate` equal to those of plain forward passes; left and "
        "right padding within 1e-4; detach, bit for bit; and parameter counts from the config alone equal to the real "
        "ones. "
        "What the bare base does not do by itself is not held against a method, which may not make it worse: a letter "
        "says so. A refusal comes at attach, before anything is trained, in words; a number says why.",
        "",
        "Written by",
        "",
        "```sh",
        "OMP_NUM_THREADS=1 python -m benchmarks.coverage --jobs 2 --out coverage.jsonl --page docs/coverage.md",
        "```",
        "",
        f"with torch {versions()['torch']} on a CPU. Nothing in spectune knows a type's name: parts are found by "
        "structure, and what was found is proved by running two tokens.",
        "",
        "| | " + " | ".join(methods) + " |",
        "|---|" + "---:|" * len(methods),
    ]
    for status, name in ((WORKS, "works"), (REFUSED, "refused"), (DEFECT, "defect"), (BASE_FAILS, "base does not run")):
        counts = [sum(found[m]["status"] == status for found in by_type.values() if m in found) for m in methods]
        if any(counts):
            lines.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", "## Types", "", "| type | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for model_type, found in by_type.items():
        lines.append(f"| {model_type} | " + " | ".join(_cell(found[m]) if m in found else "" for m in methods) + " |")
    lines += ["", *(f"{_letter(i)}: {note}.  " for i, (_, note) in enumerate(_NOTES))]
    return [*lines, *_refusals(rows), *_base_fails(rows), *_defects(rows)]


def _letter(index: int) -> str:
    return "abcdefgh"[index]


def _cell(row: dict[str, Any]) -> str:
    if row["status"] == REFUSED:
        reason = sort(row["reason"])
        return f"refused ({REASONS.index(reason) + 1})" if reason else "refused (?)"
    if row["status"] == BASE_FAILS:
        return "-"
    said = [*row.get("as_base", []), *row.get("notices", [])]
    letters = [_letter(i) for i, (pattern, _) in enumerate(_NOTES) if any(pattern in text for text in said)]
    return row["status"] + (f" ({', '.join(letters)})" if letters else "")


def _refusals(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["", "## Refusals", ""]
    refused = [row for row in rows if row["status"] == REFUSED]
    for number, reason in enumerate(REASONS, start=1):
        by_method: dict[str, list[str]] = defaultdict(list)
        for row in refused:
            if sort(row["reason"]) is reason:
                by_method[row["method"]].append(row["type"])
        if by_method:
            lines += [f"**{number}.** {reason.short}  ", f"What it would take: {reason.takes}  "]
            lines += [f"{method} ({len(types)}): {', '.join(sorted(types))}  " for method, types in by_method.items()]
            lines.append("")
    for row in refused:
        if sort(row["reason"]) is None:
            lines.append(f"**?** {row['type']}, {row['method']}: {' '.join(row['reason'].split())}  ")
    return lines


def _base_fails(rows: list[dict[str, Any]]) -> list[str]:
    failing = {row["type"]: " ".join(row["reason"].split()) for row in rows if row["status"] == BASE_FAILS}
    if not failing:
        return []
    lines = ["", "## Bases that do not run here", "", "The bare transformers model, without anything of ours:", ""]
    return lines + [f"- {model_type}: {reason}" for model_type, reason in sorted(failing.items())]


def _defects(rows: list[dict[str, Any]]) -> list[str]:
    found = [row for row in rows if row["status"] == DEFECT]
    lines = ["", "## Defects", ""] if found else []
    return lines + [f"- {row['type']}, {row['method']}: {'; '.join(row['problems'])}" for row in found]
