"""The page of `plan.py`, from its result file."""

from __future__ import annotations

import statistics
from typing import Any

GIB = 2**30


def page(cells: list[dict[str, Any]], unseen: list[str]) -> str:
    """Errors by shape and by path, then each cell."""
    done = [cell for cell in cells if "measured" in cell]
    if not done:
        return "# Predicted against measured memory\n\nNothing was measured.\n"
    first, planned = done[0], done[0]["planned_with"]
    lines = [
        "# Predicted against measured memory",
        "",
        f"Made by `benchmarks/plan.py` on {first['device']}, torch {first['torch']}, transformers "
        f"{first['transformers']}, {first['dtype']}. Peak of a step from the config alone (planned without the device, "
        f"with torch {planned['torch']}, before any cell ran), against two steps of the training loop on random "
        "weights. Nothing is fitted. Compiled cells are compiled before they are measured; what the compiler takes "
        "while it tries kernels out is in the last column. Errors are of what was measured. Not looked at while the "
        f"planner was made: {' and '.join(unseen) or 'none'}.",
        "",
    ]
    head = ["cells", "allocated: median", "worst", "reserved: median", "worst"]
    for by, title in (
        ("predicted", "Predicted before the run"),
        ("replayed", "Predicted again, by the planner as it is now"),
    ):
        chosen = [cell for cell in done if by in cell]
        if not chosen:
            continue
        lines += [f"## {title}", ""]
        if by == "replayed":
            versions = " and ".join(f"{name} {version}" for name, version in chosen[0]["replayed_with"].items())
            lines += [f"With the measurements at hand, on a CPU, with {versions}.", ""]
        for what, key in (("shape", "shape"), ("path", "path"), ("method", "method")):
            lines += [f"| {what} | {' | '.join(head)} |", f"|{'---|' * (len(head) + 1)}"]
            for name in dict.fromkeys(cell[key] for cell in chosen):
                label = f"{name} (unseen)" if name in unseen else name
                lines.append(_line(label, [cell for cell in chosen if cell[key] == name], by))
            lines += [_line("all", chosen, by), ""]
    lines += ["## Every cell", ""]
    columns = ["shape", "method", "rows x tokens", "path", "predicted allocated", "measured", "error",
               "predicted reserved", "measured", "error", "errors as predicted now",
               "reserved while compiling"]  # fmt: skip
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(_row(cell) for cell in cells)]) + "\n"


def errors(cells: list[dict[str, Any]], kind: str, by: str) -> list[float]:
    """Of a prediction (`by`), as shares of what was measured."""
    return [c[by][f"peak_{kind}"] / c["measured"][kind] - 1 for c in cells if by in c and kind in c["measured"]]


def _line(what: str, chosen: list[dict[str, Any]], by: str) -> str:
    parts = [what, str(len(chosen))]
    for kind in ("allocated", "reserved"):
        found = [abs(error) for error in errors(chosen, kind, by)]
        parts += [f"{100 * statistics.median(found):.1f}%", f"{100 * max(found):.1f}%"] if found else ["-", "-"]
    return f"| {' | '.join(parts)} |"


def _row(cell: dict[str, Any]) -> str:
    row = [cell["shape"], cell["method"], f"{cell['rows']} x {cell['length']}", cell["path"]]
    predicted = cell.get("predicted")
    if "measured" not in cell:
        why = (cell.get("skipped") or cell["failed"]).splitlines()[0].replace("|", "/")
        row += [f"{predicted['peak_allocated'] / GIB:.2f} GiB" if predicted else "-", why, ""]
        row += [f"{predicted['peak_reserved'] / GIB:.2f} GiB" if predicted else "-", "", "", "", ""]
        return f"| {' | '.join(row)} |"
    for kind in ("allocated", "reserved"):
        ours, theirs = cell["predicted"][f"peak_{kind}"], cell["measured"].get(kind)
        row += [f"{ours / GIB:.2f} GiB"]
        row += [f"{theirs / GIB:.2f} GiB", f"{100 * (ours / theirs - 1):+.1f}%"] if theirs else ["-", "-"]
    now = [f"{100 * e:+.1f}%" for kind in ("allocated", "reserved") for e in errors([cell], kind, "replayed")]
    compiling = cell.get("while_compiling", {}).get("reserved")
    row += [", ".join(now) or "-", f"{compiling / GIB:.2f} GiB" if compiling else "-"]
    return f"| {' | '.join(row)} |"
