"""What adapting costs on other text: forgetting against quality."""

from __future__ import annotations

import math

from spectune.reporting import units
from spectune.reporting.columns import loss_title
from spectune.reporting.plots.labels import Labelled, label_points
from spectune.reporting.plots.style import Plot, looks, loss_axis, loss_words, new_axes, new_figure, pad
from spectune.results.arm_result import arm_results
from spectune.results.comparison_file import ComparisonResult


def forgetting_plot(comparison: ComparisonResult) -> Plot | None:
    placed = [
        (row, row.loss, row.forgetting_kl_nats_per_token)
        for row in arm_results(comparison)
        if row.loss is not None and row.forgetting_kl_nats_per_token is not None
    ]
    placed = [entry for entry in placed if all(map(math.isfinite, entry[1:]))]
    if len(placed) < 2:
        return None
    look, loss = looks(comparison), loss_title(comparison)
    figure = new_figure()
    axes = new_axes(figure, left=0.55, right=0.12, bottom=0.52)
    x_ends = [end for row, _, _ in placed for end in (row.loss_low, row.loss_high) if end is not None]
    y_ends = [end for row, _, _ in placed for end in (row.forgetting_low, row.forgetting_high) if end is not None]
    xs, ys = [*(x for _, x, _ in placed), *x_ends], [*(y for _, _, y in placed), *y_ends]
    loss_axis(axes.xaxis, xs, loss_words(comparison))
    pad(axes, xs, [0.0, *ys])
    axes.set_ylim(bottom=0)
    points = []
    for row, x, y in placed:
        seen = look[row.name]
        across, up = row.loss_interval, row.forgetting_interval
        if across is not None:
            axes.plot(across, (y, y), color=seen.colour, linewidth=1.1, zorder=2.5)
        if up is not None:
            axes.plot((x, x), up, color=seen.colour, linewidth=1.1, zorder=2.5)
        axes.plot(x, y, seen.marker, color=seen.colour, markersize=6)
        points.append(Labelled(x, y, seen.label, across, up))
    axes.set_ylabel("forgetting, KL to the base, nats per token")
    label_points(axes, points)
    bars = "; bars are intervals" if x_ends or y_ends else ""
    return Plot(
        "forgetting-and-quality",
        "Forgetting against quality",
        f"How far each model has moved from the base on text that it was not tuned on. Lower left is better{bars}.",
        figure,
        ["Method", loss, "Forgetting"],
        [
            [
                look[row.name].label,
                units.with_interval(x, row.loss_low, row.loss_high),
                units.with_interval(y, row.forgetting_low, row.forgetting_high),
            ]
            for row, x, y in placed
        ],
    )
