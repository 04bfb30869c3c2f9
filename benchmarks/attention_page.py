"""The table and the page of `attention_kernels.py`, from its result file."""

from __future__ import annotations

from collections import Counter
from typing import Any

from spectune.health.attention_cases import DTYPES, MASKS, AttentionCase
from spectune.health.attention_check import BOUNDS, Finding

RIGHT, REFUSED = "right", "refused"
#: kernel -> what of our runs takes it
TAKEN = {
    "math": "where nothing else fits",
    "flash": "training without a mask, 16 bits",
    "efficient": "masks; float32",
    "cudnn": "training without a mask, where it saves time; **never with a mask**",
    "chosen": "validation, judging, generation, and training with a mask (what torch takes where cuDNN is off)",
    "documents": "packs on CUDA, 16 bits",
    "loop": "packs on a CPU",
}


def table(lines: list[dict[str, Any]]) -> str:
    """Kernels by masks, all types together: how many calls were right of those that torch gave the kernel, and the
    worst error; then each kind of call that was not right."""
    found = [line for line in lines if line["kind"] == "kernel"]
    head = ["kernel", "type", *MASKS]
    rows = [[kernel, dtype, *cells] for kernel in _kernels(found) for dtype, cells in _by_type(found, kernel)]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    text = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
    )
    wrong = [line for line in found if line["status"] not in (RIGHT, REFUSED)]
    text += f"\n{len(found)} calls of a kernel, {len(wrong)} not right"
    for line in wrong[:20]:
        text += f"\n  {line['kernel']}: {line['name']}: {line['status']} {line['why']}"
    for line in (line for line in lines if line["kind"] == "loop"):
        text += f"\nplain loop, {line['name']}: {_loop(line)}"
    return text


def page(lines: list[dict[str, Any]]) -> str:
    found = [line for line in lines if line["kind"] == "kernel"]
    on = next((line for line in lines if line["kind"] == "machine"), {})
    whole = {line["number"] for line in lines if line["kind"] == "whole"}
    whole = bool(whole) and whole >= set(range(max(line["jobs"] for line in lines if line["kind"] == "whole")))
    bounds = ", ".join(f"{dtype} {bound:g}" for dtype, bound in BOUNDS.items())
    names = len({line["name"] for line in found})
    left_out = (
        " (of the grid, those that the time was enough for; every three of mask, type, head size, groups and length "
        "come first)"
    )
    text = [
        "# Attention kernels: which are finite and right",
        "",
        f"Made by `benchmarks/attention_kernels.py` on {on.get('device')}, torch {on.get('torch')}, CUDA "
        f"{on.get('cuda')}, cuDNN {on.get('cudnn')}, transformers {on.get('transformers')}: {names} calls of attention"
        f"{'' if whole else left_out}, each given to every kernel that torch has for it. Output and the gradients of "
        "queries, keys and values against float64: finite everywhere, in padding and for queries that see nothing too, "
        f"and a relative error (of the norm) of at most: {bounds}. Masks are boolean, as transformers makes them: "
        "`right` and `left` are padding, `prefix` has keys before the rows' own, `window` slides, `packs` hold "
        "documents beside each other. Queries and keys with heads alike or two to a group, rows as transformers lays "
        "them out, GPT-2's too.",
        "",
        "A cell: calls that were right of those that the kernel took, and the worst error of the right ones. `-`: "
        "torch gives this kernel no such call.",
        "",
        f"| kernel | type | {' | '.join(MASKS)} | taken by spectune for |",
        f"|{'---|' * (len(MASKS) + 3)}",
    ]
    for kernel in _kernels(found):
        for dtype, cells in _by_type(found, kernel):
            text.append(f"| {kernel} | {dtype} | {' | '.join(cells)} | {TAKEN.get(kernel.split(',')[0], '')} |")
    for title, key in (("head size", "dim"), ("tokens of a row", "length")):
        sizes = sorted({line["case"][key] for line in found})
        text += ["", f"By {title}, of the calls that a run may make:", "",
                 f"| kernel | {' | '.join(map(str, sizes))} |", f"|{'---|' * (len(sizes) + 1)}"]  # fmt: skip
        for kernel in _kernels(found):
            mine = [line for line in found if line["kernel"] == kernel and _asked(line)]
            if any(line["status"] != REFUSED for line in mine):
                cells = [_cell([line for line in mine if line["case"][key] == size]) for size in sizes]
                text.append(f"| {kernel} | {' | '.join(cells)} |")
    wrong = [line for line in found if line["status"] not in (RIGHT, REFUSED)]
    text += ["", "## What was not right", ""]
    if not wrong:
        text += ["Nothing."]
    else:
        text += ["| kernel | call | status | of |", "|---|---|---|---|"]
        text += [f"| {line['kernel']} | {line['name']} | {line['status']} | {line['why']} |" for line in wrong[:60]]
        if len(wrong) > 60:
            text += ["", f"And {len(wrong) - 60} more of the same kernels: {_counted(wrong[60:])}."]
    loops = [line for line in lines if line["kind"] == "loop"]
    if loops:
        text += [
            "",
            "## A plain transformers loop on padded rows",
            "",
            "GPT-2 of 27M weights (random), bfloat16, batches of 64 rows of 24 to 192 tokens padded with a mask, "
            "AdamW at 1e-3; nothing of spectune in it (`benchmarks/plain_loop.py`). torch's own choice is to allow "
            "cuDNN's attention. Memory that held NaN shows what a kernel leaves unwritten.",
            "",
            "| rows padded on the | cuDNN's attention | memory before a step | what came |",
            "|---|---|---|---|",
            *(
                f"| {line['side']} | {'allowed' if line['cudnn'] else 'switched off'} | "
                f"{'NaN' if line['spoilt'] else 'as it was'} | {_loop(line)} |"
                for line in sorted(loops, key=lambda line: line["name"], reverse=True)
            ),
        ]
    return "\n".join(text) + "\n"


def _asked(line: dict[str, Any]) -> bool:
    return Finding(AttentionCase(**line["case"]), line["kernel"], line["status"]).asked


def _kernels(found: list[dict[str, Any]]) -> list[str]:
    met = dict.fromkeys(line["kernel"] for line in found)
    order = list(TAKEN)
    return sorted(met, key=lambda name: (_place(order, name), name))


def _place(order: list[str], name: str) -> int:
    plain = name.split(",")[0]
    return order.index(plain) if plain in order else len(order)


def _by_type(found: list[dict[str, Any]], kernel: str) -> list[tuple[str, list[str]]]:
    rows = []
    for dtype in DTYPES:
        mine = [line for line in found if line["kernel"] == kernel and line["case"]["dtype"] == dtype]
        cells = [_cell([line for line in mine if line["case"]["mask"] == mask]) for mask in MASKS]
        if any(cell != "-" for cell in cells):
            rows.append((dtype, cells))
    return rows


def _cell(lines: list[dict[str, Any]]) -> str:
    taken = [line for line in lines if line["status"] != REFUSED]
    if not taken:
        return "-"
    right = [line for line in taken if line["status"] == RIGHT]
    worst = max((error for line in right for error in line["errors"].values()), default=None)
    text = f"{len(right)}/{len(taken)}" + ("" if worst is None else f" ({worst:.0e})")
    others = Counter(line["status"] for line in taken if line["status"] != RIGHT)
    return text + "".join(f", {count} {status}" for status, count in others.items())


def _counted(lines: list[dict[str, Any]]) -> str:
    return ", ".join(f"{count} x {kernel} {status}" for (kernel, status), count in Counter(
        (line["kernel"], line["status"]) for line in lines
    ).items())  # fmt: skip


def _loop(line: dict[str, Any]) -> str:
    if "losses" not in line:
        return str(line.get("status"))
    losses = ", ".join(f"{loss:.3f}" for loss in line["losses"])
    if line["broken"] is None:
        return f"all finite in {len(line['losses'])} steps, losses {losses}"
    broken = line["broken"]
    text = f"step {broken['step']}: gradients of {broken['weights']} of {broken['of']} weights are not finite"
    text += f" (losses {losses})"
    for call in line["calls"][:1]:
        bad = [name for name, finite in call["gradients"].items() if not finite] or ["the output"]
        text += (
            f"; attention {call['call'] + 1} of {tuple(call['shape'])} with the mask {call['mask']} was given finite "
            f"numbers, and its {', '.join(bad)} {'are' if bad != ['the output'] else 'is'} not"
        )
    return text
