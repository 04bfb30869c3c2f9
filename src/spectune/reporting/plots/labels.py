"""Labels at the things they name, none over another."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from spectune.reporting.plots.style import INK, MUTED

SIZE = 8.0
#: where a label may lie, in points from its point: near first, right and above before the rest
DISTANCES = (7.0, 13.0, 22.0, 32.0)
ANGLES = (0, 90, 270, 180, 45, 315, 135, 225)


@dataclass(frozen=True)
class Labelled:
    """A point and what it is called; the ends of its error bars, if it has any."""

    x: float
    y: float
    text: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


def label_points(axes: Axes, points: Sequence[Labelled], line: Sequence[tuple[float, float]] = ()) -> None:
    """A label beside each point, where it covers no point, no error bar, no other label and no part of the line (whose
    corners are given, in data), and stays inside the axes.

    Greedy: points with the most neighbours first; the limits of the axes must not change afterwards.
    """
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer: Any = canvas.get_renderer()  # type: ignore[no-untyped-call]
    scale = axes.figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    centres = [axes.transData.transform((p.x, p.y)) for p in points]
    taken = [Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale) for x, y in centres]
    for point in points:
        taken += _bars(axes, point, scale)
    for (x0, y0), (x1, y1) in itertools.pairwise(axes.transData.transform(corner) for corner in line):
        (left, right), (bottom, top) = sorted((x0, x1)), sorted((y0, y1))
        taken.append(Bbox.from_extents(left - scale, bottom - scale, right + scale, top + scale))
    crowds = [sum(math.hypot(x - u, y - v) < 40 * scale for u, v in centres) for x, y in centres]
    for index in sorted(range(len(points)), key=lambda i: -crowds[i]):
        x, y = centres[index]
        text = axes.text(0, 0, points[index].text, fontsize=SIZE, color=INK)
        box = text.get_window_extent(renderer)
        text.remove()
        choices = []
        for far, distance in enumerate(DISTANCES):
            for rank, angle in enumerate(ANGLES):
                placed = _beside(x, y, box.width, box.height, distance * scale, angle)
                covered = sum(_overlap(placed, other) for other in taken)
                outside = box.width * box.height - _overlap(placed, inside)
                choices.append((covered + 4 * outside + 6 * scale * far + 0.5 * scale * rank, far, angle, placed))
        _, far, angle, placed = min(choices, key=lambda choice: choice[0])
        taken.append(placed)
        _draw(axes, points[index], placed, (x, y), far)


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names of lines, right of the axes: (y of the end in data, name, colour), spread so that none overlap."""
    if not ends:
        return
    figure, extent = axes.figure, axes.get_window_extent()
    dots, start, right = figure.dpi / 72, extent.x1, axes.get_xlim()[1]
    ordered = sorted((float(axes.transData.transform((right, y))[1]), i) for i, (y, _, _) in enumerate(ends))
    places = _spread([at for at, _ in ordered], 1.25 * SIZE * dots, extent.y0, extent.y1)
    for place, (at, index) in zip(places, ordered, strict=True):
        _, name, colour = ends[index]
        line = [(start + 2 * dots, at), (start + 9 * dots, place)]
        xs, ys = zip(*(figure.transFigure.inverted().transform(p) for p in line), strict=True)
        axes.plot(xs, ys, transform=figure.transFigure, color=colour, linewidth=0.8, clip_on=False)
        x, y = figure.transFigure.inverted().transform((start + 11 * dots, place))
        figure.text(x, y, name, fontsize=SIZE, va="center", color=INK)


def _spread(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """Sorted places moved as little as it takes to lie a gap apart: neighbours that are too near become a block around
    their middle (as in isotonic regression), and the whole stays between low and high where it fits."""
    blocks: list[list[float]] = []  # each [sum of wanted starts, members]
    for number, place in enumerate(places):
        blocks.append([place - number * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            last = blocks.pop()
            blocks[-1] = [blocks[-1][0] + last[0], blocks[-1][1] + last[1]]
    starts = [total / members for total, members in blocks for _ in range(int(members))]
    top = high - (len(places) - 1) * gap
    starts = [max(low, min(start, top)) if top >= low else start for start in starts]
    return [start + number * gap for number, start in enumerate(starts)]


def _bars(axes: Axes, point: Labelled, scale: float) -> list[Bbox]:
    found = []
    if point.x_range is not None:
        (x0, y0), (x1, _) = (axes.transData.transform((x, point.y)) for x in point.x_range)
        found.append(Bbox.from_extents(x0, y0 - scale, x1, y0 + scale))
    if point.y_range is not None:
        (x0, y0), (_, y1) = (axes.transData.transform((point.x, y)) for y in point.y_range)
        found.append(Bbox.from_extents(x0 - scale, y0, x0 + scale, y1))
    return found


def _beside(x: float, y: float, width: float, height: float, distance: float, angle: int) -> Bbox:
    across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    left = x + across * distance + (0 if across > 0.1 else -width if across < -0.1 else -width / 2)
    bottom = y + up * distance + (0 if up > 0.1 else -height if up < -0.1 else -height / 2)
    return Bbox.from_bounds(left, bottom, width, height)


def _overlap(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(width, 0.0) * max(height, 0.0))


def _draw(axes: Axes, point: Labelled, box: Bbox, centre: tuple[float, float], far: int) -> None:
    back = axes.transData.inverted()
    x, y = back.transform((box.x0, (box.y0 + box.y1) / 2))
    axes.text(x, y, point.text, fontsize=SIZE, color=INK, va="center", ha="left", zorder=5)
    if far > 1:  # so far away that a line must say which point is meant
        near = (min(max(centre[0], box.x0), box.x1), min(max(centre[1], box.y0), box.y1))
        (x0, y0), (x1, y1) = back.transform(centre), back.transform(near)
        axes.plot([x0, x1], [y0, y1], color=MUTED, linewidth=0.6, zorder=1.5)
