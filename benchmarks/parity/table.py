"""docs/results/parity.md from result files, and from nothing else."""

from __future__ import annotations

from typing import Any

from benchmarks.parity import paths
from benchmarks.parity.driver import runs_of
from benchmarks.parity.paths import METHODS, PATHS, SUBSETS
from benchmarks.parity.verdict import Check, checks

Line = dict[str, Any]
HEAD = "# Losses of the fast paths, and of a plain loop"
ABOUT = (
    "Made by `python -m benchmarks.parity` (see `--help`). A fast path is a run of `spectune.train`; the plain loop "
    "calls the transformers model, takes torch's cross entropy of all logits, clips, and steps with "
    "`torch.optim.AdamW` over float32 weights. Same base, rows, order, first weights and learning rates (each method's "
    "default, linear with warm-up), loss on completions, no dropout.\n\n"
    "`held`: steps at weights that the plain float32 loop passed through, against the plain loop in float64: the "
    "largest difference of a loss in nats a token, the relative error of the whole gradient (of all held steps "
    "together, and the largest of one), the least cosine and that of the first step. `free`: training from the first "
    "weights, against the plain loop in the path's dtype: the largest difference of a step's loss among the first 20 "
    "and among all, the mean, and the validation loss less the plain one's. steps/s and memory (allocated, in the free "
    "steps) are a side note: processes share the device."
    "\n\n"
    "Two runs that round differently part, and the more the longer they train: `attention` is the plain float32 loop "
    "with another attention kernel, `last bit` the same begun one unit of the last place away, `bfloat16` the plain "
    "loop in bfloat16, all against the plain float32 loop; `bfloat16, last bit` is against the plain bfloat16 loop."
)


def rules() -> str:
    return (
        f"Tolerances. **Exact paths** (float32): held loss {paths.HELD_LOSS:g}, held gradient "
        f"{paths.TIMES_PLAIN:g} times the plain float32 loop's own error; free: {paths.EARLY:g} in the "
        f"first 20 steps, {paths.LATE:g} later, validation {paths.VALID:g}, or {paths.TIMES_CONTROL:g} times what "
        f"another attention kernel does, if that is more. **bfloat16**: held, {paths.TIMES_BF16:g} times the plain "
        f"bfloat16 loop's own errors (loss: at least {paths.BF16_LOSS:g}; gradients: of all held steps together, as "
        "the largest of a few is a draw: the plain loop's own goes up and down by a factor of three from weights to "
        f"weights); free, {paths.TIMES_PARTED:g} times what plain bfloat16 parts from plain float32, or from itself "
        f"begun one unit of the last place away, if that is more (at least {paths.BF16_FREE:g}, validation "
        f"{paths.BF16_VALID:g}). "
        "**Other mathematics**: " + "; ".join(_approximate()) + ". A base in int8 or NF4 is also held against the "
        "plain loop over the weights that it stands for: within an exact path's gradient error in float32, within a "
        "bfloat16 one's in bfloat16."
    )


def _approximate() -> list[str]:
    return [
        f"{path.label}: cosine at least {path.cosine:g}, validation loss within {path.valid:g}"
        for path in PATHS.values()
        if path.kind == "approximate"
    ]


def page(lines: list[Line]) -> str:
    parts = [HEAD, "", ABOUT, "", rules(), "", SUBSETS, ""]
    for device in dict.fromkeys(line["device"] for line in lines if "environment" in line):
        own = [line for line in lines if line["device"] == device]
        parts += device_part(device, own)
    return "\n".join(parts).rstrip() + "\n"


def device_part(device: str, lines: list[Line]) -> list[str]:
    one = next(line for line in lines if "environment" in line)
    env = one["environment"]
    packages = ", ".join(
        f"{name} {env['packages'][name]}" for name in ("torch", "transformers") if name in env["packages"]
    )
    sizes = " and ".join(dict.fromkeys(f"{x['steps']} steps of {x['rows']} rows" for x in lines if "environment" in x))
    held = max(line["held_steps"] for line in lines)
    #: the newest of each
    found = {(line["method"], line["path"]): line for line in lines}
    parts = [f"## {device}", ""]
    parts += [
        f"{one['base']} on {one['data']}, {sizes}, {held} held steps; {packages}, spectune {env['spectune']}.",
        "",
    ]
    results = {key: verdict(key, found) for key in found if key[1] in PATHS}
    bad = [f"{method} {path}" for (method, path), (words, _) in results.items() if words not in ("pass", "")]
    parts += [
        f"{sum(words == 'pass' for words, _ in results.values())} of {len(results)} runs are within tolerance."
        + (f" Not: {'; '.join(bad)}." if bad else ""),
        "",
    ]
    parts += _head("method | plain run", [])
    names = {
        "plain": "float32", "plain-attention": "attention", "plain-last-bit": "last bit", "plain-bf16": "bfloat16",
        "plain-bf16-last-bit": "bfloat16, last bit",
    }  # fmt: skip
    for method in METHODS:
        for path, label in names.items():
            if (method, path) in found:
                parts.append(f"| {method} | {label} | {' | '.join(figures(found[method, path]))} |")
    parts += ["", *_head("path | method", ["steps/s", "GiB", ""])]
    kind = "cpu" if device == "cpu" else "cuda"
    for path in PATHS:
        for method in METHODS:
            if (method, path) in found:
                line, (words, note) = found[method, path], results[method, path]
                cells = [*figures(line), *costs(line)] if "free" in line else [""] * 9
                parts.append(f"| {PATHS[path].label} | {method} | {' | '.join(cells)} | {_said(words, note)} |")
    missing = [f"{m} {p}" for m in METHODS for p in runs_of(m, kind, []) if p in PATHS and (m, p) not in found]
    parts += ["", f"Not run here: {', '.join(missing)}.", ""] if missing else [""]
    return parts


def _head(first: str, last: list[str]) -> list[str]:
    names = [first, "held: loss", "gradient", "cosine (first)", "free: first 20", "all", "mean", "validation", *last]
    row = f"| {' | '.join(names)} |"
    return [row, "|" + "---|" * (row.count("|") - 1)]


def verdict(key: tuple[str, str], found: dict[tuple[str, str], Line]) -> tuple[str, str]:
    """ "pass", "FAIL", "failed", "refused" or "" (nothing to judge it by), and what there is to say."""
    method, path = key
    line = found[key]
    for word in ("failed", "refused"):
        if word in line:
            return word, " ".join(str(line[word]).split()).replace("|", "\\|")[:300]
    known = {p: other for (m, p), other in found.items() if m == method}
    try:
        made: list[Check] = checks(PATHS[path], line, known)
    except KeyError as error:
        return "", f"the plain run {error} is not there"
    bad = [check for check in made if not check.holds]
    return ("FAIL" if bad else "pass"), "; ".join(f"{c.name}: {c.value:.2g}, tolerated {c.bound:.2g}" for c in bad)


def _said(words: str, note: str) -> str:
    shown = words if words == "pass" else f"**{words}**" if words else ""
    return f"{shown} {note}".strip()


def figures(line: Line) -> list[str]:
    held, free = line.get("held"), line["free"]
    decoded = line.get("held_decoded")
    at = ["", "", ""]
    if isinstance(held, dict):
        gradient = f"{held['pooled']:.1e} ({held['error']:.1e})"
        at = [f"{held['loss']:.1e}", gradient, f"{held['least_cosine']:.6f} ({held['first_cosine']:.6f})"]
        if decoded:
            at[1] += f"; over the decoded base {decoded['pooled']:.1e} ({decoded['error']:.1e})"
    return [*at, f"{free['early']:.1e}", f"{free['largest']:.1e}", f"{free['mean']:.1e}", f"{free['valid']:+.1e}"]


def costs(line: Line) -> list[str]:
    speed, peak = line["steps_per_second"], line["peak_allocated"]
    return [f"{speed:.1f}" if speed else "-", f"{peak / 2**30:.2f}" if peak else "-"]
