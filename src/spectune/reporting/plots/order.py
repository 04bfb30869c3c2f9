"""The verdict drawn: intervals in order, groups without a difference, and differences to full fine-tuning."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from spectune.reporting import units
from spectune.reporting.plots import style
from spectune.reporting.plots.style import GRID, INK, MUTED, PAPER, Plot, looks
from spectune.results import ComparisonResult, Verdict
from spectune.results.arm_result import FULL

ROW = 0.27
#: between the bars of two groups, inches
LANE = 0.16


def order_plot(comparison: ComparisonResult) -> Plot | None:
    """Arms from best to worst with their intervals; a bar at the right joins arms that do not differ."""
    verdict = comparison.verdict or Verdict()
    arms = [(arm, arm.mean) for arm in verdict.arms if arm.mean is not None]
    if len(arms) < 2:
        return None
    look = looks(comparison)
    names = [arm.name for arm, _ in arms]
    groups = [group for group in verdict.groups if len(group) > 1 and set(group) <= set(names)]
    figure = style.new_figure(height=ROW * len(arms) + 0.68)
    left = 0.25 + 0.067 * max(len(look[name].label) for name in names)
    axes = style.new_axes(figure, left=left, right=0.2 + LANE * len(groups), bottom=0.5, top=0.1)
    for place, (arm, mean) in enumerate(arms):
        seen = look[arm.name]
        if arm.low is not None and arm.high is not None:
            axes.plot([arm.low, arm.high], [place, place], color=seen.colour, linewidth=1.6)
        axes.plot(mean, place, seen.marker, color=seen.colour, markersize=4.2)
    found = [value for arm, mean in arms for value in (mean, arm.low, arm.high) if value is not None]
    title, words = style.verdict_words(comparison)
    style.loss_axis(axes.xaxis, found, words)
    style.pad(axes, found, [0, len(arms) - 1], 0.06)
    _rows(axes, [look[name].label for name in names])
    for lane, group in enumerate(groups):
        _bar(axes, lane, sorted(names.index(name) for name in group))
    what = f"Mean and {100 * verdict.confidence:.3g}% interval of each method, best first. "
    joined = "Methods that a bar at the right joins with dots do not differ by more than noise."
    what += joined if groups else "All of them differ by more than noise."
    body = []
    for name, (arm, mean) in zip(names, arms, strict=True):
        alike = dict.fromkeys(look[o].label for group in groups if name in group for o in group if o != name)
        interval = units.with_interval(mean, arm.low, arm.high)
        body.append([look[name].label, interval, ", ".join(alike) or "none"])
    header = ["Method", title, "No difference from"]
    return Plot("verdict", "The order, and what cannot be told apart", what, figure, header, body)


def difference_plot(comparison: ComparisonResult) -> Plot | None:
    """A forest plot of each arm's loss minus full fine-tuning's (the best arm's where full was not run)."""
    verdict = comparison.verdict or Verdict()
    methods = {run.name: run.method for run in comparison.runs}
    names = [arm.name for arm in verdict.arms]
    against = next((name for name in names if methods.get(name) == FULL), names[0] if names else "")
    found = [
        (pair.b if pair.a == against else pair.a, *ends, pair)
        for pair in verdict.pairs
        if against in (pair.a, pair.b) and (ends := pair.seen_from(against)) is not None
    ]
    if not found:
        return None
    found.sort(key=lambda entry: entry[1])
    look, reference = looks(comparison), comparison.label_of(against)
    figure = style.new_figure(height=ROW * len(found) + 0.68)
    left = 0.25 + 0.067 * max(len(look[entry[0]].label) for entry in found)
    axes = style.new_axes(figure, left=left, right=1.08, bottom=0.5, top=0.1)
    axes.axvline(0, color=INK, linewidth=0.9)
    for place, (name, difference, low, high, pair) in enumerate(found):
        seen = look[name]
        axes.plot([low, high], [place, place], color=seen.colour, linewidth=1.4)
        fill = seen.colour if pair.differs else PAPER
        axes.plot(difference, place, seen.marker, color=seen.colour, markerfacecolor=fill, markersize=5)
        text, way = f"{difference:+.3f} ±{(high - low) / 2:.3f}", axes.get_yaxis_transform()
        axes.text(1.02, place, text, transform=way, fontsize=8, va="center", color=INK)
    _rows(axes, [look[entry[0]].label for entry in found])
    unit = f", {comparison.data.loss_unit}" if comparison.decided_by_loss else ""
    of = "loss" if comparison.decided_by_loss else style.verdict_words(comparison)[1]
    axes.set_xlabel(f"{of} minus that of {look[against].label}{unit}")
    what = (
        f"Each method's {of} minus that of {reference}, measured on the same rows, with its interval. Filled: the "
        f"difference is larger than noise; hollow: it is not. {'Right' if verdict.higher_is_better else 'Left'} of the "
        "line is better."
    )
    header = ["Method", "Difference", "From", "To", "Share", "p, adjusted", "Differs"]
    body = []
    for name, *sizes, pair in found:
        # a share of the reference's loss, which a pair has only if the reference comes first
        relative = units.percent(pair.relative, sign=True) if pair.a == against else units.MISSING
        differs = units.number(pair.p_adjusted), "yes" if pair.differs else "no"
        body.append([look[name].label, *(f"{size:+.3f}" for size in sizes), relative, *differs])
    return Plot("differences", f"Differences from {reference}", what, figure, header, body)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    style.fixed_ticks(axes.yaxis, range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first at the top
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.5)


def _bar(axes: Axes, lane: int, members: list[int]) -> None:
    """A group's bar in its lane right of the axes, with a dot for each member."""
    width = axes.get_window_extent().width / axes.figure.dpi
    x = 1 + (0.12 + LANE * lane) / width
    way = axes.get_yaxis_transform()
    axes.plot([x, x], [members[0], members[-1]], color=MUTED, linewidth=1.6, transform=way, clip_on=False)
    axes.plot([x] * len(members), members, "o", color=INK, markersize=3.6, transform=way, clip_on=False)
