"""Quality against what it costs: trainable share, memory and time, each with its Pareto front; and forgetting."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from spectune.reporting import units
from spectune.reporting.columns import FORGETTING
from spectune.reporting.plots import style
from spectune.reporting.plots.labels import Labelled, label_points
from spectune.reporting.plots.style import INK, MUTED, PAPER, Look, Plot, looks
from spectune.results import ComparisonResult
from spectune.results.arm_result import ArmResult, is_finite, undominated

#: an arm, its cost and its loss
Placed = tuple[ArmResult, float, float]
Interval = tuple[float, float] | None


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
    where = f"({comparison.base.device})"
    costs = (
        Cost(
            "share",
            "trainable share",
            "trainable weights, % of the base (log)",
            lambda row: None if row.trainable_share is None else 100 * row.trainable_share,
            lambda value: units.percent(value / 100),
            log=True,
        ),
        Cost(
            "memory",
            "memory in training",
            f"peak memory of tensors in training, MB {where}",
            lambda row: None if row.train_memory_bytes is None else row.train_memory_bytes / 1e6,
            lambda value: units.size(1e6 * value),
        ),
        Cost("time", "training time", f"training time of one run, s {where}", lambda r: r.train_seconds, units.seconds),
    )
    rows = [(row, row.loss) for row in style.drawn(comparison) if is_finite(row.loss)]
    placed = [[(row, x, loss) for row, loss in rows if (x := cost.value(row)) is not None and x > 0] for cost in costs]
    return [_against(cost, found, comparison) for cost, found in zip(costs, placed, strict=True) if len(found) > 1]


def _against(cost: Cost, placed: Sequence[Placed], comparison: ComparisonResult) -> Plot:
    figure, look = style.new_figure(), looks(comparison)
    axes = style.new_axes(figure, left=0.62, right=0.12, bottom=0.52)
    xs, ys = [x for _, x, _ in placed], [y for _, _, y in placed]
    ends = [bound for row, _, _ in placed for bound in (row.loss_low, row.loss_high) if bound is not None]
    if cost.log or max(xs) > 20 * min(xs):
        style.log_axis(axes.xaxis, xs)
    style.loss_axis(axes.yaxis, [*ys, *ends], style.loss_words(comparison))
    style.pad(axes, xs, [*ys, *ends])
    # as good in cost and loss, and better in one of them
    front = undominated(placed, lambda a, b: a[1] <= b[1] and a[2] <= b[2] and a[1:] != b[1:])
    axes.set_xlabel(cost.axis)
    _draw(axes, placed, front, look)
    bars = "; bars are intervals of the loss" if ends else ""
    what = "Filled points lie on the Pareto front (the stepped line): nothing is better in both. "
    what += f"Lower and further left is better{bars}."
    header = ["Method", cost.axis.partition(",")[0].capitalize(), style.drawn_title(comparison), "On the front"]
    body = []
    for row, x, y in placed:
        on_front = "yes" if (row, x, y) in front else "no"
        body.append([look[row.name].label, cost.text(x), _loss_text(row), on_front])
    return Plot(f"quality-and-{cost.name}", f"Quality against {cost.title}", what, figure, header, body)


def _loss_text(row: ArmResult) -> str:
    return units.with_interval(row.loss, row.loss_low, row.loss_high)


def forgetting_plot(comparison: ComparisonResult) -> Plot | None:
    """How far the arms have moved from the base on other text, against their losses."""
    found = [(row, row.loss, row.forgetting_kl_nats_per_token) for row in style.drawn(comparison)]
    placed = [(row, x, y) for row, x, y in found if is_finite(x) and is_finite(y)]
    if len(placed) < 2:
        return None
    figure, look = style.new_figure(), looks(comparison)
    axes = style.new_axes(figure, left=0.55, right=0.12, bottom=0.52)
    x_ends = [end for row, _, _ in placed for end in (row.loss_low, row.loss_high) if end is not None]
    y_ends = [end for row, _, _ in placed for end in (row.forgetting_low, row.forgetting_high) if end is not None]
    xs, ys = [*(x for _, x, _ in placed), *x_ends], [*(y for _, _, y in placed), *y_ends]
    style.loss_axis(axes.xaxis, xs, style.loss_words(comparison))
    style.pad(axes, xs, [0.0, *ys])
    axes.set_ylim(bottom=0)
    points = [_point(axes, x, y, look[row.name], row.loss_interval, row.forgetting_interval) for row, x, y in placed]
    axes.set_ylabel("forgetting, KL to the base, nats per token")
    label_points(axes, points)
    bars = "; bars are intervals" if x_ends or y_ends else ""
    what = f"How far each model has moved from the base on text that it was not tuned on. Lower left is better{bars}."
    header = ["Method", style.drawn_title(comparison), FORGETTING.title]
    body = [[look[row.name].label, _loss_text(row), FORGETTING.text(row)] for row, _, _ in placed]
    return Plot("forgetting-and-quality", "Forgetting against quality", what, figure, header, body)


def _point(axes: Axes, x: float, y: float, look: Look, across: Interval, up: Interval, **marker: Any) -> Labelled:
    """Draw a point with its intervals."""
    if across is not None:
        axes.plot(across, (y, y), color=look.colour, linewidth=1.1, zorder=2.5)
    if up is not None:
        axes.plot((x, x), up, color=look.colour, linewidth=1.1, zorder=2.5)
    axes.plot(x, y, look.marker, color=look.colour, markersize=6, **marker)
    return Labelled(x, y, look.label, across, up)


def _draw(axes: Axes, placed: Sequence[Placed], front: Sequence[Placed], look: Mapping[str, Look]) -> None:
    """The points with their intervals, the front, the word "better" where it has room, and the labels."""
    corners = _front(axes, sorted((x, y) for _, x, y in front))
    points = []
    for row, x, y in placed:
        seen = look[row.name]
        fill = {"markerfacecolor": seen.colour if (row, x, y) in front else PAPER, "markeredgewidth": 1.2}
        points.append(_point(axes, x, y, seen, None, row.loss_interval, **fill))
    places = [axes.transAxes.inverted().transform(axes.transData.transform((p.x, p.y))) for p in points]
    # unless a point, or its label below it, would lie over the word in the lower left corner
    if not any(x < 0.35 and y < 0.25 for x, y in places):
        arrow = {"arrowstyle": "->", "color": MUTED, "linewidth": 0.7}
        way: Any = {"xycoords": "axes fraction", "textcoords": "axes fraction", "arrowprops": arrow}
        axes.annotate("better", (0.015, 0.015), xytext=(0.075, 0.07), fontsize=7.5, color=MUTED, **way)
    label_points(axes, points, corners)


def _front(axes: Axes, front: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Draw the border of what has been reached, out to the edges of the axes; its corners."""
    corners = [(front[0][0], axes.get_ylim()[1])]
    for x, y in front:
        corners += [(x, corners[-1][1]), (x, y)]
    corners.append((axes.get_xlim()[1], front[-1][1]))
    axes.plot(*zip(*corners, strict=True), color=INK, alpha=0.45, linewidth=0.9, zorder=1)
    return corners
