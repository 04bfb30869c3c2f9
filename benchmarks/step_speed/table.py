"""docs/results/step_speed.md from result files, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.step_speed.grid import REAL_SYSTEMS, SHAPES, SYSTEMS, TINY
from benchmarks.step_speed.results import Measured, Results
from benchmarks.step_speed.targets import TARGETS

HEADER = (
    "Made by `python -m benchmarks.step_speed` (see `--help`). Every measurement is a process of its own; all systems "
    "take turns, then all again: median and spread ((largest - smallest) / median) of the repeats. A step has the "
    "transfer of the batch, forward, backward, clipping and the optimizer. All systems get the same token ids in the "
    "same order, every token a target, the same compute dtype, the same trained linears, and no LoRA matrix is zero "
    "(zeros take less power and run faster). Warm-up lasts until five steps in a row compile nothing; memory is the "
    "peak of torch's allocator over the timed steps. The fastest peer is PEFT's fastest, or the fastest plain loop. "
    "`of the limit`: operations that a step cannot do without (a frozen base 4 (N_l + N_h) + 6 T q L + 6 P a token, "
    "full fine-tuning 6 (N_l + N_h) + 6 T q L; recomputation does not count) at PEAK. `losses` is the largest relative "
    "difference of the first 20 losses to those of the reference: PEFT's plain loop or else a compiled one, for full "
    "fine-tuning the plain loop over float32 weights, spectune's eager loop where there is none of these; a row beyond "
    "tolerance (1% in bf16) is marked and meets no target. An fp8 base is held to 1% in the first loss, at the "
    "same weights; then it learns these random tokens in another way (on real rows: parity.md). A plain loop over bf16 "
    "weights rounds small steps to none, which its losses show. There is no dropout."
)


def page(lines: list[dict[str, Any]]) -> str:
    """The whole page."""
    parts = ["# Training speed, ours and others'", ""]
    peaks = sorted({line["peak_tflops"] for line in lines if line["peak_tflops"]})
    peak = " and ".join(f"{value:g}" for value in peaks)
    parts += [HEADER.replace("PEAK", f"{peak} TFLOP/s of bf16 matrix products" if peaks else "a rate given"), ""]
    devices = list(dict.fromkeys(line["device"] for line in lines if "device" in line))
    for device in devices:
        own = [line for line in lines if line.get("device", devices[0]) == device]
        parts += [f"## {device}", "", environment(own), ""]
        results = Results(own)
        checked = targets(results)
        if checked:
            parts += ["| target | measured | |", "|---|---|---|", *checked, ""]
        for shape in results.shapes:
            parts += shape_table(results, shape)
        parts += short_rows(results.short())
    return "\n".join(parts).rstrip() + "\n"


def environment(lines: Iterable[dict[str, Any]]) -> str:
    """Versions, clocks and power, allocator: all that were seen."""
    lines = list(lines)
    packages: dict[str, set[str]] = {}
    for line in lines:
        for name, version in line.get("packages", {}).items():
            packages.setdefault(name, set()).add(version)
    words = [", ".join(f"{name} {'/'.join(sorted(found))}" for name, found in packages.items())]
    if any("sm_clock_mhz" in line for line in lines):
        clocks = [line["sm_clock_mhz"] for line in lines if "sm_clock_mhz" in line]
        power = [line["power_watts"] for line in lines if "power_watts" in line]
        words.append(f"SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz, {min(power):.0f} to {max(power):.0f} W")
    words.append(f"PYTORCH_ALLOC_CONF={'/'.join(sorted({line['allocator'] for line in lines}))}")
    threads = {line["threads"] for line in lines if line.get("device") == "cpu"}
    words += [f"{'/'.join(map(str, sorted(threads)))} threads"] if threads else []
    return "; ".join(words) + "."


def targets(results: Results) -> list[str]:
    """One row for each target whose shape was measured here."""
    rows = []
    for target in TARGETS:
        if target.shape in results.shapes:
            words, met, by = target.check(results)
            invalid = met is not None and not valid(results, (target.shape, target.method, by))
            verdict = "losses differ" if invalid else {True: "met", False: "**missed**", None: ""}[met]
            rows.append(f"| {target.text()} | {words} | {verdict} |")
    return rows


def valid(results: Results, key: tuple[str, str, str]) -> bool:
    found = results.difference(*key)
    return found is None or found.judged <= found.tolerance


def shape_table(results: Results, shape: str) -> list[str]:
    keys = [key for key in results.cases if key[0] == shape and key[2] in SYSTEMS]
    if not keys:
        return []
    first = next((line for key in keys for line in results.cases[key].lines if "dtype" in line), {})
    size = (SHAPES | TINY).get(shape)
    batch = f"{first.get('rows', size.rows if size else '?')} x {size.length if size else '?'} tokens"
    parts = [
        f"### {shape}, {batch}, {first.get('dtype', '')}",
        "",
        "| method | system | tokens/s | spread | of the limit | allocated | reserved | to the fastest peer | trained "
        "| compile | losses |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in keys:
        found = results.cases[key]
        cells = row(results, key, found) if found.done else [f"not measured: {cell(found.reason)}", *[""] * 8]
        parts.append(f"| {key[1]} | {SYSTEMS[key[2]].label} | {' | '.join(cells)} |")
    return [*parts, ""]


def row(results: Results, key: tuple[str, str, str], found: Measured) -> list[str]:
    shape, method, _ = key
    line = found.done[0]
    length = "" if line["length"] == (SHAPES | TINY)[shape].length else f" ({line['length']} a row)"
    spread, share = found.spread, found.share
    peer = results.peer(shape, method)
    return [
        f"{found.speed:,.0f}{length}" + ("" if valid(results, key) else " (losses differ)"),
        f"{100 * spread:.1f}% of {len(found.done)}" if spread is not None else "one run",
        f"{share:.2f}" if share is not None else "-",
        *memory(found),
        f"{found.speed / peer[1].speed:.2f}" if peer is not None else "-",
        f"{line['trained_parameters']:,}",
        compiling(found),
        losses(results, key),
    ]


SHORT = (
    "Rows of random tokens as long as E2E's records and sentences, drawn as `spectune train` draws them; the same rows "
    "in each step for all. Tokens/s are those of rows, padding is not counted; with a loss on completions, prompts "
    "are not targets. The ratios are of tokens/s. On CUDA spectune's blocks are compiled."
)


def short_rows(results: Results) -> list[str]:
    """What packing and the loss on completions add; nothing where it was not measured."""
    if not results.cases:
        return []
    parts = ["### Short rows: packing, and the loss on completions", "", SHORT]
    for shape in results.shapes:
        keys = [key for key in results.cases if key[0] == shape]
        if not keys:
            continue
        rows = "/".join(dict.fromkeys(str(line.get("rows", "?")) for key in keys for line in results.cases[key].lines))
        parts += [
            "",
            f"{shape}, {rows} rows a step:",
            "",
            "| method | system | tokens/s | targets/s | spread | padding where padded | allocated | reserved "
            "| to every token a target, padded | to PEFT, plain loop | compile | losses |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for key in keys:
            found = results.cases[key]
            cells = short_row(results, key, found) if found.done else [f"not measured: {cell(found.reason)}", *[""] * 9]
            parts.append(f"| {key[1]} | {REAL_SYSTEMS[key[2]].label} | {' | '.join(cells)} |")
    return [*parts, ""]


def short_row(results: Results, key: tuple[str, str, str], found: Measured) -> list[str]:
    shape, method, name = key
    others = [results.get(shape, method, other) for other in ("real-ours-padded-all", "real-peft")]
    return [
        f"{found.speed:,.0f}" + ("" if valid(results, key) else " (losses differ)"),
        f"{found.median('targets_per_second'):,.0f}",
        f"{100 * found.spread:.1f}% of {len(found.done)}" if found.spread is not None else "one run",
        f"{100 * found.done[0]['padding_share']:.0f}%",
        *memory(found),
        *(f"{found.speed / other.speed:.2f}" if other is not None else "-" for other in others),
        compiling(found),
        "other targets" if name.endswith("-all") else losses(results, key),
    ]


def memory(found: Measured) -> list[str]:
    """Allocated and reserved; where the device does not tell, what the process took."""
    sizes = [found.gib("peak_allocated"), found.gib("peak_reserved")]
    if sizes == [None, None]:
        resident = found.gib("peak_resident")
        return ["-", f"{resident:.2f} GiB resident" if resident is not None else "-"]
    return [f"{size:.1f} GiB" if size is not None else "-" for size in sizes]


def compiling(found: Measured) -> str:
    seconds = max(line["compile_seconds"] for line in found.done)
    return f"{seconds:.0f} s" + ("" if all(line["settled"] for line in found.done) else ", not ended")


def losses(results: Results, key: tuple[str, str, str]) -> str:
    found = results.difference(*key)
    if found is None:
        return "reference" if results.reference(*key) == key[2] else "-"
    first = "" if found.judged == found.largest else f" (the first {100 * found.judged:.2g}%)"
    return f"{100 * found.largest:.2g}%{first}" + (
        "" if valid(results, key) else f", more than {100 * found.tolerance:g}%"
    )


def cell(text: str) -> str:
    """Text that stays in its cell."""
    return " ".join(text.split()).replace("|", "\\|")[:300]
