"""The figure: what share each method trains, and what it reaches with that."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from spectune.reporting import units
from spectune.reporting.rows import ComparisonRow, comparison_rows, why_no_relative_performance

#: Okabe and Ito's colours, told apart by colour-blind readers too
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


class ShownFigure(Figure):
    """A figure that a notebook shows without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", dpi=110)
        return out.getvalue()


def comparison_figure(comparison: Mapping[str, Any]) -> Figure:
    """Two panels: trainable share of each method as bars, relative performance against it; shares on log scales."""
    rows = [row for row in comparison_rows(comparison) if not row.failed and row.trainable_share]
    figure = ShownFigure(figsize=(10.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    bars, points = figure.subplots(1, 2, width_ratios=(1, 1.25))
    ordered = sorted(rows, key=lambda row: row.trainable_share or 0.0)
    looks = {row.name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, row in enumerate(rows)}
    _bars(bars, ordered, looks)
    _points(points, ordered, looks, why_no_relative_performance(comparison))
    base = comparison["base"]
    figure.suptitle(f"{base['name']}, {units.count(base['total_parameters'])} weights", fontsize=11)
    return figure


def _bars(axes: Axes, rows: list[ComparisonRow], looks: Mapping[str, tuple[str, str]]) -> None:
    shares = [100 * (row.trainable_share or 0.0) for row in rows]
    left = min(shares, default=1.0) / 3
    for place, (row, share) in enumerate(zip(rows, shares, strict=True)):
        axes.barh(place, share - left, left=left, color=looks[row.name][0], height=0.62)
        text = f" {units.percent(row.trainable_share)} ({units.count(row.trainable_parameters)})"
        axes.text(share, place, text, va="center", fontsize=8.5)
    axes.set_xscale("log")
    axes.set_xlim(left, max(shares, default=1.0) * 30)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_xlabel("trainable weights, % of the base (log)")
    _plain(axes)


def _points(axes: Axes, rows: list[ComparisonRow], looks: Mapping[str, tuple[str, str]], undefined: str | None) -> None:
    values = [row.valid_loss if undefined else row.relative_performance for row in rows]
    placed = [
        (row, value) for row, value in zip(rows, values, strict=True) if value is not None and math.isfinite(value)
    ]
    lowest = min((value for _, value in placed), default=0.0)
    span = max((value for _, value in placed), default=1.0) - lowest or 1.0
    taken: list[tuple[float, float]] = []
    for row, value in placed:
        share = 100 * (row.trainable_share or 0.0)
        colour, marker = looks[row.name]
        axes.plot(share, value, marker=marker, color=colour, markersize=8, linestyle="none")
        above = all(abs(value + 0.06 * span - y) > 0.07 * span or share / x > 12 or x / share > 12 for x, y in taken)
        offset = 9 if above else -15
        axes.annotate(
            row.label, (share, value), xytext=(0, offset), textcoords="offset points", ha="center", fontsize=8.5
        )
        taken.append((share, value + (0.06 if above else -0.1) * span))
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 2.5, high * 2.5)
    axes.set_ylim(lowest - 0.16 * span, lowest + 1.2 * span)
    axes.set_xlabel("trainable weights, % of the base (log)")
    if undefined:
        axes.set_ylabel("validation loss, nats per token (lower is better)")
        axes.set_title(f"relative performance is undefined: {undefined}", fontsize=8.5)
    else:
        axes.axhline(100, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        axes.set_ylabel("relative performance (0 base, 100 full)")
    _plain(axes)


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(visible=True, axis="x", which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    # labels need room to the right of 100%, but there is no such share
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value <= 100 else ""))
    axes.xaxis.set_minor_formatter(NullFormatter())
