"""Quality against what it costs: loss by trainable share, memory and time, each with its Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from spectune.reporting import units
from spectune.reporting.columns import loss_title
from spectune.reporting.plots.labels import Labelled, label_points
from spectune.reporting.plots.style import (
    INK,
    MUTED,
    PAPER,
    Look,
    Plot,
    log_axis,
    looks,
    loss_axis,
    loss_words,
    new_axes,
    new_figure,
    pad,
)
from spectune.reporting.rows import ComparisonRow, comparison_rows

Number = Callable[[ComparisonRow], float | None]


def quality_plots(comparison: Mapping[str, Any]) -> list[Plot]:
    rows = [row for row in comparison_rows(comparison) if row.loss is not None and math.isfinite(row.loss)]
    look, loss = looks(comparison), loss_title(comparison)
    device = comparison["base"]["device"]
    made = [
        _against(
            "quality-and-share",
            "Quality against trainable share",
            "trainable weights, % of the base (log)",
            rows,
            look,
            loss,
            loss_words(comparison),
            lambda row: None if row.trainable_share is None else 100 * row.trainable_share,
            lambda value: units.percent(value / 100),
            log=True,
        ),
        _against(
            "quality-and-memory",
            "Quality against memory in training",
            f"peak memory of tensors in training, MB ({device})",
            rows,
            look,
            loss,
            loss_words(comparison),
            lambda row: None if row.train_memory_bytes is None else row.train_memory_bytes / 1e6,
            lambda value: units.size(1e6 * value),
        ),
        _against(
            "quality-and-time",
            "Quality against training time",
            f"training time of one run, s ({device})",
            rows,
            look,
            loss,
            loss_words(comparison),
            lambda row: row.train_seconds,
            units.seconds,
        ),
    ]
    return [plot for plot in made if plot is not None]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in one coordinate without losing in the other; less is better."""
    return [i for i, (x, y) in enumerate(points) if not any(u <= x and v <= y and (u, v) != (x, y) for u, v in points)]


def _against(
    name: str,
    title: str,
    x_label: str,
    rows: Sequence[ComparisonRow],
    look: Mapping[str, Look],
    loss: str,
    loss_name: str,
    cost: Number,
    text: Callable[[float], str],
    *,
    log: bool = False,
) -> Plot | None:
    placed = [(row, x, row.loss) for row in rows if (x := cost(row)) is not None and x > 0 and row.loss is not None]
    if len(placed) < 2:
        return None
    figure = new_figure()
    axes = new_axes(figure, left=0.62, right=0.12, bottom=0.52)
    xs, ys = [x for _, x, _ in placed], [y for _, _, y in placed]
    ends = [bound for row, _, _ in placed for bound in (row.loss_low, row.loss_high) if bound is not None]
    if log or max(xs) > 20 * min(xs):
        log_axis(axes.xaxis, xs)
    loss_axis(axes.yaxis, [*ys, *ends], loss_name)
    pad(axes, xs, [*ys, *ends])
    front = pareto([(x, y) for _, x, y in placed])
    line = _front(axes, sorted((placed[i][1], placed[i][2]) for i in front))
    points = []
    for index, (row, x, y) in enumerate(placed):
        seen = look[row.name]
        interval = None if row.loss_low is None or row.loss_high is None else (row.loss_low, row.loss_high)
        if interval is not None:
            axes.plot([x, x], interval, color=seen.colour, linewidth=1.1, zorder=2.5)
        fill = seen.colour if index in front else PAPER
        axes.plot(x, y, seen.marker, color=seen.colour, markerfacecolor=fill, markersize=6, markeredgewidth=1.2)
        points.append(Labelled(x, y, seen.label, y_range=interval))
    axes.set_xlabel(x_label)
    if not _corner_taken(axes, points):
        axes.annotate(
            "better",
            (0.015, 0.015),
            xytext=(0.075, 0.07),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=7.5,
            color=MUTED,
            arrowprops={"arrowstyle": "->", "color": MUTED, "linewidth": 0.7},
        )
    label_points(axes, points, line)
    bars = "; bars are intervals of the loss" if ends else ""
    return Plot(
        name,
        title,
        f"Filled points lie on the Pareto front (the stepped line): nothing is better in both. Lower and further "
        f"left is better{bars}.",
        figure,
        ["Method", x_label.partition(",")[0].capitalize(), loss, "On the front"],
        [
            [
                look[row.name].label,
                text(x),
                units.with_interval(y, row.loss_low, row.loss_high),
                "yes" if index in front else "no",
            ]
            for index, (row, x, y) in enumerate(placed)
        ],
    )


def _front(axes: Axes, front: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Draw the border of what has been reached, out to the edges of the axes; its corners."""
    corners = [(front[0][0], axes.get_ylim()[1])]
    for x, y in front:
        corners += [(x, corners[-1][1]), (x, y)]
    corners.append((axes.get_xlim()[1], front[-1][1]))
    axes.plot(*zip(*corners, strict=True), color=INK, alpha=0.45, linewidth=0.9, zorder=1)
    return corners


def _corner_taken(axes: Axes, points: Sequence[Labelled]) -> bool:
    """Whether a point, or its label below it, would lie over the word in the lower left corner."""
    places = [axes.transAxes.inverted().transform(axes.transData.transform((p.x, p.y))) for p in points]
    return any(x < 0.35 and y < 0.25 for x, y in places)
