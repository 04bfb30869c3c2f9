"""Losses against training steps, and against rows of data."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spectune.reporting import units
from spectune.reporting.artifacts import Curve, curve
from spectune.reporting.plots.labels import label_ends
from spectune.reporting.plots.style import Look, Plot, log_axis, looks, loss_axis, new_axes, new_figure
from spectune.results.comparison_file import ComparisonResult

#: validations that make a curve; a run with fewer is drawn by its training loss
ENOUGH = 3
#: means that a training loss is drawn with: single batches are noise
BLOCKS = 30

Line = list[tuple[float, float]]


def learning_plot(comparison: ComparisonResult, folder: Path) -> Plot | None:
    """Validation loss by step, the mean over seeds with each seed as a thin line; the training loss where there are
    hardly any validations."""
    curves = {n: [c for run in runs if (c := curve(folder, run))] for n, runs in comparison.runs_by_arm.items()}
    validated = all(len(c.valid) >= ENOUGH for found in curves.values() for c in found)
    lines = {name: [line for c in found if (line := _line(c, validated))] for name, found in curves.items()}
    lines = {name: found for name, found in lines.items() if found}
    if not lines or not comparison.decided_by_loss:  # losses of unlike things have no axis in common
        return None
    look = looks(comparison)
    dots = {} if validated else {name: [c.valid[-1] for c in found if c.valid] for name, found in curves.items()}
    points = [p for found in lines.values() for line in found for p in line]
    points += [dot for found in dots.values() for dot in found]
    what = f"{'validation' if validated else 'training'} loss, {comparison.data.loss_unit}"
    figure, axes = _scaled(points, [look[name] for name in lines], what)
    ends = []
    for name, drawn in lines.items():
        seen, mean = look[name], mean_line(drawn)
        if len(drawn) > 1:
            for line in drawn:
                axes.plot(*zip(*line, strict=True), color=seen.colour, linewidth=0.6, alpha=0.5)
        axes.plot(*zip(*mean, strict=True), color=seen.colour, linewidth=1.6)
        for step, value in dots.get(name, ()):
            axes.plot(step, value, seen.marker, color=seen.colour, markersize=5, clip_on=False, zorder=3)
        marked = dots.get(name) or [mean[-1]]
        ends.append((sum(y for _, y in marked) / len(marked), seen.label, seen.colour))
    tokens = comparison.data.target_tokens_per_step
    axes.set_xlabel("training steps" + ("" if tokens is None else f" of about {tokens:,.0f} target tokens"))
    label_ends(axes, ends)
    what = "Validation loss while training" if validated else "Training loss, as means over blocks of steps"
    if any(len(found) > 1 for found in lines.values()):
        what += ": the mean over seeds, and each seed as a thin line"
    what += "." if validated else "; markers are validation losses at the end."
    steps = sorted({step for found in lines.values() for step, _ in mean_line(found)})
    shown = steps[:: max(1, len(steps) // 8)]
    header = ["Method", *(f"step {step:,.0f}" for step in shown)]
    means = [(look[name].label, dict(mean_line(found))) for name, found in lines.items()]
    body = [[label, *(units.number(mean.get(step)) for step in shown)] for label, mean in means]
    return Plot("learning-curves", "Learning curves", what, figure, header, body)


def data_plot(comparison: ComparisonResult) -> Plot | None:
    """Validation loss by the number of training rows."""
    values: dict[str, dict[float, list[float]]] = {}
    for point in comparison.curves:
        if point.valid_loss is not None and point.rows:
            values.setdefault(point.name, {}).setdefault(point.rows, []).append(point.valid_loss)
    lines = {name: [(rows, sum(v) / len(v)) for rows, v in sorted(found.items())] for name, found in values.items()}
    counts = sorted({rows for line in lines.values() for rows, _ in line})
    if len(counts) < 2 or not comparison.decided_by_loss:
        return None
    look = looks(comparison)
    points = [p for line in lines.values() for p in line]
    what = f"validation loss, {comparison.data.loss_unit}"
    figure, axes = _scaled(points, [look[name] for name in lines], what)
    log_axis(axes.xaxis, counts)
    axes.set_xlim(counts[0] / 1.2, counts[-1] * 1.04)
    for name, line in lines.items():
        seen = look[name]
        [drawn] = axes.plot(*zip(*line, strict=True), color=seen.colour, linewidth=1.4, clip_on=False)
        drawn.set(marker=seen.marker, markersize=4.5)
    axes.set_xlabel("training rows (log)")
    label_ends(axes, [(line[-1][1], look[name].label, look[name].colour) for name, line in lines.items()])
    return Plot(
        "data-curve",
        "How much data each method needs",
        "Validation loss after training on parts of the rows, each at the learning rate that was found for all rows.",
        figure,
        ["Method", *(f"{rows:,} rows" for rows in counts)],
        [[look[name].label, *(units.number(dict(line).get(rows)) for rows in counts)] for name, line in lines.items()],
    )


def mean_line(lines: Sequence[Line]) -> Line:
    """The mean over runs at the places that all of them have; the longest where they have none in common."""
    common = set.intersection(*({x for x, _ in line} for line in lines))
    if not common:
        return max(lines, key=len)
    tables = [dict(line) for line in lines]
    return [(x, sum(table[x] for table in tables) / len(tables)) for x in sorted(common)]


def _line(found: Curve, validated: bool) -> Line:
    if validated:
        return found.valid
    size = max(1, len(found.train) // BLOCKS)
    blocks = [found.train[start : start + size] for start in range(0, len(found.train), size)]
    return [(block[-1][0], sum(value for _, value in block) / len(block)) for block in blocks]


def _scaled(points: Line, looks: Sequence[Look], what: str) -> tuple[Figure, Axes]:
    """A figure and its axes for some points, with room at the right for the longest name."""
    figure, longest = new_figure(height=3.5), max(len(look.label) for look in looks)
    axes = new_axes(figure, left=0.6, right=0.3 + 0.066 * longest, bottom=0.52)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    loss_axis(axes.yaxis, ys, what)
    axes.set_xlim(0, max(xs))
    low, high = min(ys), max(ys)
    if axes.get_yscale() == "log":
        axes.set_ylim(low / 1.12, high * 1.08)
    else:
        axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.04 * (high - low or 1))
    return figure, axes
