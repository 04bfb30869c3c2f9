"""The tables of `ordinary.py`, from its result file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: what is set out to be reached: of |measured / planned - 1|
MEDIAN, WORST = 0.02, 0.10
KINDS = ("allocated", "reserved")
HEADER = (
    "Made by `python -m benchmarks.ordinary` on MACHINE. Each run is a `spectune train` or an arm of a `spectune "
    "compare --quick`, as a user types it, with the defaults of everything that is not named. Rows: `short` and "
    "`packed` are records and sentences of E2E, 64 a step, padded and packed; `text` is windows of 1,024 tokens "
    "(GPT-2) or 2,048 (Llama), 8 a step; `chat` is dialogues of several turns, 16 a step (at 8B half of both). The "
    "27M is trained where its weights were carried, the other bases have random weights. Planned: "
    "`predicted_memory_bytes` of result.json, said before the first step; measured: the peak of all steps, of torch's "
    "allocator. Errors are measured / planned - 1. Runs shared the card, so their seconds are no benchmark."
)
_HEAD = "| runs | allocated: median | worst | reserved: median | worst |"


def newest(path: Path) -> list[dict[str, Any]]:
    """The last line of each cell, in the order in which cells first came."""
    found: dict[str, dict[str, Any]] = {}
    if path.exists():
        for text in path.read_text("utf-8").splitlines():
            line = json.loads(text)
            found[line["cell"]] = line
    return list(found.values())


def runs(lines: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """All runs with their cell's line."""
    return ((line, run) for line in lines for run in line["runs"])


def error(run: dict[str, Any], kind: str) -> float | None:
    """How far the steps' measured peak is from the plan, as a share of the plan."""
    planned, measured = run["planned"].get(f"peak_{kind}"), run["measured"].get(f"train_{kind}")
    return measured / planned - 1 if planned and measured else None


def table(lines: list[dict[str, Any]]) -> str:
    """Median and worst error by base, kind of rows, command and method, and of all."""
    parts = [f"| of {_HEAD}", f"|{'---|' * 6}"]
    found = list(runs(lines))
    for key in ("base", "data", "command"):
        for name in dict.fromkeys(line[key] for line, _ in found):
            parts.append(_row(name, [run for line, run in found if line[key] == name]))
    for name in dict.fromkeys(run["method"] for _, run in found):
        parts.append(_row(name, [run for _, run in found if run["method"] == name]))
    parts.append(_row("all", [run for _, run in found]))
    failed = [f"{line['cell']}: {line['error']}" for line in lines if "error" in line]
    unplanned = sum(run["planned"].get("peak_allocated") is None for _, run in found)
    parts += ["", verdict([run for _, run in found])]
    if unplanned:
        parts.append(f"Runs without a plan: {unplanned}.")
    return "\n".join([*parts, *(f"FAILED {text}" for text in failed)])


def verdict(found: list[dict[str, Any]]) -> str:
    """Whether the median and the worst error are what they are to be."""
    words = []
    for kind in KINDS:
        errors = [abs(e) for run in found if (e := error(run, kind)) is not None]
        if errors:
            met = statistics.median(errors) <= MEDIAN and max(errors) <= WORST
            words.append(
                f"{kind}: median {statistics.median(errors):.1%} (at most {MEDIAN:.0%}), worst {max(errors):.1%} "
                f"(at most {WORST:.0%}): {'met' if met else 'not met'}"
            )
    return "; ".join(words) or "nothing was measured"


def _row(name: str, found: list[dict[str, Any]]) -> str:
    cells = [name, str(len(found))]
    for kind in KINDS:
        errors = sorted((e for run in found if (e := error(run, kind)) is not None), key=abs)
        cells += [f"{statistics.median(map(abs, errors)):.1%}", f"{errors[-1]:+.1%}"] if errors else ["-", "-"]
    return f"| {' | '.join(cells)} |"


def page(lines: list[dict[str, Any]]) -> str:
    """The whole page."""
    found = list(runs(lines))
    machines = dict.fromkeys(_machine(run["execution"]) for _, run in found)
    parts = [
        "# Ordinary runs: planned against measured memory",
        "",
        HEADER.replace("MACHINE", " and ".join(machines) or "nothing"),
        "",
        *table([line for line in lines if "error" not in line or line["runs"]]).split("\nFAILED")[0].splitlines(),
        "",
        "## Every run",
        "",
        "| base | rows | command | method | allocated: planned | measured | | reserved: planned | measured | "
        "| other phases, allocated | recorded, compiled, recomputed | seconds of the command |",
        f"|{'---|' * 13}",
    ]
    parts += [_run(line, run) for line, run in found]
    failed = [line for line in lines if "error" in line]
    if failed:
        parts += ["", "## Failed", "", "| cell | what it said |", "|---|---|"]
        parts += [f"| {line['cell']} | {' '.join(line['error'].split()).replace('|', '/')} |" for line in failed]
    return "\n".join(parts) + "\n"


def _run(line: dict[str, Any], run: dict[str, Any]) -> str:
    cells = [line["base"], line["data"], line["command"] + (f", {line['note']}" if line["note"] else ""), run["method"]]
    for kind in KINDS:
        planned, measured = run["planned"].get(f"peak_{kind}"), run["measured"].get(f"train_{kind}")
        share = error(run, kind)
        cells += [_gb(planned), _gb(measured), "-" if share is None else f"{share:+.1%}"]
    others = {
        key.removesuffix("_allocated"): size
        for key, size in run["measured"].items()
        if key.endswith("_allocated") and not key.startswith("train")
    }
    cells.append(", ".join(f"{name} {_gb(size)}" for name, size in others.items()))
    how = run["execution"]
    flags = (how.get("cuda_graphs"), how.get("torch_compile"), run["recomputed"])
    cells += [", ".join({True: "yes", False: "no", None: "-"}.get(flag, str(flag)) for flag in flags)]
    cells.append(str(round(line["seconds"])))
    return f"| {' | '.join(cells)} |"


def _machine(how: dict[str, Any]) -> str:
    packages = how.get("packages") or {}
    return f"{how.get('device')}, torch {packages.get('torch')}, transformers {packages.get('transformers')}"


def _gb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f} GB"
