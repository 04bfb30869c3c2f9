"""Quality against what it costs: loss by trainable share, memory and time, each with its Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
from spectune.results.arm_result import ArmResult, arm_results, undominated
from spectune.results.comparison_file import ComparisonResult

#: an arm, its cost and its loss
Placed = tuple[ArmResult, float, float]


@dataclass(frozen=True)
class Cost:
    """What the loss is drawn against: its value of an arm (None: not drawn) and how the table writes it."""

    name: str
    title: str
    axis: str
    value: Callable[[ArmResult], float | None]
    text: Callable[[float], str]
    log: bool = False


def quality_plots(comparison: ComparisonResult) -> list[Plot]:
    device = comparison.base.device
    costs = (
        Cost(
            "quality-and-share",
            "Quality against trainable share",
            "trainable weights, % of the base (log)",
            lambda row: None if row.trainable_share is None else 100 * row.trainable_share,
            lambda value: units.percent(value / 100),
            log=True,
        ),
        Cost(
            "quality-and-memory",
            "Quality against memory in training",
            f"peak memory of tensors in training, MB ({device})",
            lambda row: None if row.train_memory_bytes is None else row.train_memory_bytes / 1e6,
            lambda value: units.size(1e6 * value),
        ),
        Cost(
            "quality-and-time",
            "Quality against training time",
            f"training time of one run, s ({device})",
            lambda row: row.train_seconds,
            units.seconds,
        ),
    )
    rows = [(row, row.loss) for row in arm_results(comparison) if row.loss is not None and math.isfinite(row.loss)]
    made = []
    for cost in costs:
        placed = [(row, x, loss) for row, loss in rows if (x := cost.value(row)) is not None and x > 0]
        if len(placed) > 1:
            made.append(_against(cost, placed, comparison))
    return made


def _against(cost: Cost, placed: Sequence[Placed], comparison: ComparisonResult) -> Plot:
    figure, look = new_figure(), looks(comparison)
    axes = new_axes(figure, left=0.62, right=0.12, bottom=0.52)
    xs, ys = [x for _, x, _ in placed], [y for _, _, y in placed]
    ends = [bound for row, _, _ in placed for bound in (row.loss_low, row.loss_high) if bound is not None]
    if cost.log or max(xs) > 20 * min(xs):
        log_axis(axes.xaxis, xs)
    loss_axis(axes.yaxis, [*ys, *ends], loss_words(comparison))
    pad(axes, xs, [*ys, *ends])
    front = undominated(placed, _dominates)
    axes.set_xlabel(cost.axis)
    _draw(axes, placed, front, look)
    bars = "; bars are intervals of the loss" if ends else ""
    return Plot(
        cost.name,
        cost.title,
        f"Filled points lie on the Pareto front (the stepped line): nothing is better in both. Lower and further "
        f"left is better{bars}.",
        figure,
        ["Method", cost.axis.partition(",")[0].capitalize(), loss_title(comparison), "On the front"],
        [
            [
                look[row.name].label,
                cost.text(x),
                units.with_interval(y, row.loss_low, row.loss_high),
                "yes" if (row, x, y) in front else "no",
            ]
            for row, x, y in placed
        ],
    )


def _dominates(one: Placed, other: Placed) -> bool:
    """Whether `one` is as good in cost and loss, and better in one of them."""
    (_, x, y), (_, u, v) = one, other
    return x <= u and y <= v and (x, y) != (u, v)


def _draw(axes: Axes, placed: Sequence[Placed], front: Sequence[Placed], look: Mapping[str, Look]) -> None:
    """The points with their intervals, the front, the word "better" where it has room, and the labels."""
    corners = _front(axes, sorted((x, y) for _, x, y in front))
    points = []
    for row, x, y in placed:
        seen = look[row.name]
        if row.loss_interval is not None:
            axes.plot([x, x], row.loss_interval, color=seen.colour, linewidth=1.1, zorder=2.5)
        fill = seen.colour if (row, x, y) in front else PAPER
        axes.plot(x, y, seen.marker, color=seen.colour, markerfacecolor=fill, markersize=6, markeredgewidth=1.2)
        points.append(Labelled(x, y, seen.label, y_range=row.loss_interval))
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
    label_points(axes, points, corners)


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
