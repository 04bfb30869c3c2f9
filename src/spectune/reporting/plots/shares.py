"""The figure at a glance: what share each method trains, and what it reaches with that."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from spectune.reporting import units
from spectune.reporting.plots import style
from spectune.reporting.plots.labels import Labelled, label_points
from spectune.reporting.plots.style import MUTED, Look, log_axis, new_axes
from spectune.results import ComparisonResult
from spectune.results.arm_result import ArmResult, is_finite, why_no_relative_performance

WIDTH, BARS = 10.5, 4.4


def comparison_figure(comparison: ComparisonResult) -> Figure:
    """Two panels: trainable share of each method as bars, relative performance against it; shares on log scales."""
    rows = [row for row in style.drawn(comparison) if not row.failed and row.trainable_share]
    ordered = sorted(rows, key=lambda row: row.trainable_share or 0.0)
    with style.figure_style():
        figure = style.new_figure(WIDTH, max(4.2, 0.33 * len(rows) + 1.2))
        seen = style.looks(comparison)
        left = 0.35 + 0.068 * max((len(seen[row.name].label) for row in rows), default=6)
        _bars(new_axes(figure, left=left, right=WIDTH - BARS, bottom=0.55, top=0.5), ordered, seen)
        points = new_axes(figure, left=BARS + 0.85, right=0.15, bottom=0.55, top=0.5)
        _points(points, ordered, seen, comparison)
        base = comparison.base
        title = f"{style.shortened(base.name)}, {units.count(base.total_parameters)} weights"
        figure.suptitle(title, fontsize=10.5, y=0.97)
    return figure


def _bars(axes: Axes, rows: list[ArmResult], seen: Mapping[str, Look]) -> None:
    shares = [100 * (row.trainable_share or 0.0) for row in rows]
    left = min(shares, default=1.0) / 3
    log_axis(axes.xaxis, [left, *shares, 100.0])
    for place, (row, share) in enumerate(zip(rows, shares, strict=True)):
        axes.barh(place, share - left, left=left, color=seen[row.name].colour, height=0.62)
        text = f" {units.percent(row.trainable_share)} ({units.count(row.trainable_parameters)})"
        axes.text(share, place, text, va="center", fontsize=8)
    axes.set_xlim(left, max(shares, default=1.0) * 60)
    style.fixed_ticks(axes.yaxis, range(len(rows)), [seen[row.name].label for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    # labels need room to the right of 100%, but there is no such share
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value <= 100 else ""))
    axes.set_xlabel("trainable weights, % of the base (log)")


def _points(axes: Axes, rows: list[ArmResult], seen: Mapping[str, Look], comparison: ComparisonResult) -> None:
    undefined, by_loss = why_no_relative_performance(comparison), comparison.decided_by_loss
    unit = comparison.data.loss_unit.replace("target token", "token")
    words = f"validation loss, {unit}" if by_loss else style.loss_words(comparison)
    values = [
        (row, (row.valid_loss if by_loss else row.loss) if undefined else row.relative_performance) for row in rows
    ]
    placed = [(row, 100 * (row.trainable_share or 0.0), value) for row, value in values if is_finite(value)]
    log_axis(axes.xaxis, [share for _, share, _ in placed])
    style.pad(axes, [share for _, share, _ in placed], [value for _, _, value in placed], 0.1, 0.12)
    if not undefined:
        axes.axhline(100, color=MUTED, linewidth=0.8, linestyle="--", zorder=0)
    for row, share, value in placed:
        axes.plot(share, value, seen[row.name].marker, color=seen[row.name].colour, markersize=7)
    axes.set_xlabel("trainable weights, % of the base (log)")
    if undefined:
        axes.set_ylabel(f"{words} (lower is better)")
        if by_loss:
            axes.set_title(f"relative performance is undefined: {undefined}", fontsize=8.5, pad=4)
    else:
        axes.set_ylabel("relative performance (0 base, 100 full)")
    label_points(axes, [Labelled(share, value, seen[row.name].label) for row, share, value in placed])
