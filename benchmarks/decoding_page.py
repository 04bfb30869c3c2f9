"""The page of `benchmarks.decoding`: tokens a second by case and system, and what of it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: case, the case that it is a share of, at least so much of it
SHARES = (
    ("one LoRA, 1 row", "bare, 1 row", 0.85),
    ("one LoRA, 16 rows", "bare, 16 rows", 0.85),
    ("8 LoRAs, 16 rows", "bare, 16 rows", 0.75),
    ("16 deltas of 7 methods, 16 rows", "bare, 16 rows", 0.6),
)


def page(lines: Sequence[dict[str, Any]], note: str = "") -> str:
    """Markdown. `note`: a paragraph at the end."""
    about = lines[0]
    systems = list(dict.fromkeys(line["system"] for line in lines))
    cases = list(dict.fromkeys(line["case"] for line in lines))
    rates = {(line["case"], line["system"]): line.get("tokens_per_second") for line in lines}
    out = [
        "# Decoding",
        "",
        f"`python -m benchmarks.decoding` on {about['device']}: {about['shape']}, {about['dtype']}, {about['prompt']} "
        f"tokens in, {about['new']} out; torch {about['torch']}, transformers {about['transformers']}, PEFT "
        f"{about['peft']}. All systems in one process, measured in turns; medians of the repeats, tokens a second over "
        "all rows, the pass over the prompts left out. No delta is merged.",
        "",
        f"| | {' | '.join(systems)} |",
        f"|---|{'---|' * len(systems)}",
        *(f"| {case} | {' | '.join(_said(rates.get((case, system))) for system in systems)} |" for case in cases),
        "",
        "| share of the bare base | " + " | ".join(system for system in systems if "ours" in system) + " | asked for |",
        "|---|" + "---|" * (1 + sum("ours" in system for system in systems)),
    ]
    for case, whole, least in SHARES:
        shares = [_share(rates.get((case, s)), rates.get((whole, s))) for s in systems if "ours" in s]
        out.append(f"| {case} | {' | '.join(shares)} | {least} |")
    counted = [line for line in lines if "kernels_a_step" in line]
    if counted:
        out += ["", "| | system | kernels a step | busy, ms a step |", "|---|---|---|---|"]
        out += [
            f"| {line['case']} | {line['system']} | {line['kernels_a_step']:.0f} | {line['busy_ms_a_step']:.2f} |"
            for line in counted
        ]
    failed = [line for line in lines if line.get("failed")]
    if failed:
        out += ["", "Not measured:", ""]
        out += [f"- {line['case']}, {line['system']}: {line['failed']}" for line in failed]
    if note:
        out += ["", note]
    return "\n".join([*out, ""])


def _said(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.0f}"


def _share(rate: float | None, whole: float | None) -> str:
    return "-" if rate is None or whole is None else f"{rate / whole:.2f}"
