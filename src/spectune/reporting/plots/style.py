"""How every figure looks: one column of a paper, direct labels, colours and markers that stay with their arm."""

import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from spectune.files.plain_text import one_line
from spectune.reporting.columns import loss_title, metric_title
from spectune.results.arm_result import ArmResult, arm_results
from spectune.results.comparison_file import ComparisonResult

#: ink, secondary ink, grid and paper; the page gives each of these colours another value in dark mode
INK, MUTED, GRID, PAPER = "#1b1b1a", "#5e5e5a", "#e4e4df", "#ffffff"
#: after Okabe and Ito (jfly.uni-koeln.de/color), darkened to a contrast of 3 against white
COLOURS = ("#0072b2", "#c8500a", "#007f5f", "#b8578f", "#8a6400", "#4a90c8", "#5b4fa0", "#4d4d4d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
WIDTH, HEIGHT = 4.1, 3.4
LONGEST_LABEL = 26

STYLE: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same picture everywhere
    "font.size": 8.5, "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "axes.labelcolor": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "text.color": INK,
    "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7,
    "figure.facecolor": PAPER, "axes.facecolor": PAPER,
    "text.usetex": False,  # nor are they a program, whatever the user's own settings of matplotlib are
    "text.parse_math": False,  # labels are the user's: a dollar sign is a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "spectune",  # the same comparison gives the same bytes
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, the same in every figure."""

    label: str
    colour: str
    marker: str


@dataclass(frozen=True)
class Plot:
    """A figure with the words and numbers that stand for it where it cannot be seen.

    Attributes:
        name: of its files.
        title: what it shows, in a few words.
        description: how to read it, in a sentence or two: its caption.
        header, body: the numbers drawn.
        in_page, in_folder: where it is shown.
    """

    name: str
    title: str
    description: str
    figure: Figure
    header: list[str]
    body: list[list[str]]
    in_page: bool = True
    in_folder: bool = True


class ShownFigure(Figure):
    """A figure that a notebook shows without pyplot's global state."""

    def draw(self, renderer: Any) -> None:
        with figure_style():  # ticks are made when they are drawn
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", dpi=110)
        return out.getvalue()


def figure_style() -> AbstractContextManager[None]:
    return rc_context(STYLE)


def looks(comparison: ComparisonResult) -> dict[str, Look]:
    """By arm, in the comparison's order."""
    return {
        name: Look(shortened(label), COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)])
        for i, (name, label) in enumerate(comparison.labels.items())
    }


def shortened(label: str) -> str:
    label = one_line(label)
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    figure = ShownFigure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def new_axes(figure: Figure, *, left: float, right: float, bottom: float, top: float = 0.08) -> Axes:
    """Axes with margins in inches, so that they lie the same whatever the labels are."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))


def log_axis(axis: Axis, values: Iterable[float]) -> None:
    """A log axis with plain numbers at 1, 2, 5 or at powers of ten, whichever are few."""
    found = [value for value in values if value > 0 and math.isfinite(value)]
    low, high = min(found, default=1.0), max(found, default=1.0)
    set_scale = axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale
    set_scale("log")
    decades = math.log10(high / low)
    # beside each other numbers need more room than above each other
    many, some = (1.6, 0.6) if axis is axis.axes.xaxis else (2.2, 1.2)
    subs = (1.0,) if decades > many else (1.0, 2.0, 5.0) if decades > some else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axis.set_minor_formatter(NullFormatter())


def loss_axis(axis: Axis, values: Sequence[float], title: str) -> None:
    """Losses: on a log scale, which the title then says, where the largest would press the others together."""
    found = [value for value in values if value > 0 and math.isfinite(value)]
    if len(found) == len(values) and found and max(found) > 4 * min(found):
        log_axis(axis, found)
        axis.set_label_text(f"{title} (log)")
    else:
        axis.set_label_text(title)
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def loss_words(comparison: ComparisonResult) -> str:
    """What an axis of `ArmResult.loss` is called."""
    if not comparison.decided_by_loss:
        return drawn_title(comparison)
    return f"{loss_title(comparison).lower().replace('valid', 'validation')}, {comparison.data.loss_unit}"


def drawn_title(comparison: ComparisonResult) -> str:
    """What is drawn as the loss, or in its place."""
    by = comparison.data.decided_by
    return loss_title(comparison) if comparison.decided_by_loss else f"1 - {metric_title(by).lower()}"


def verdict_words(comparison: ComparisonResult) -> tuple[str, str]:
    """What the verdict is on, as a header and as the title of an axis."""
    if comparison.decided_by_loss:
        return loss_title(comparison), loss_words(comparison)
    title = metric_title(comparison.data.decided_by)
    return title, title.lower()


def drawn(comparison: ComparisonResult) -> list[ArmResult]:
    """The arms with what decides in the loss's place, as an error: 1 - accuracy, of which less is better, too."""
    arms, by = arm_results(comparison), comparison.data.decided_by
    if comparison.decided_by_loss:
        return arms
    found = []
    for arm in arms:
        value, (low, high) = arm.metrics.get(by), arm.metric_intervals.get(by, (None, None))
        error, least, most = (None if end is None else 1 - end for end in (value, high, low))
        found.append(dataclasses.replace(arm, loss=error, loss_low=least, loss_high=most))
    return found


def pad(axes: Axes, xs: Sequence[float], ys: Sequence[float], x_share: float = 0.12, y_share: float = 0.14) -> None:
    """Room around the points, in their own scale."""
    axes.set_xlim(*_padded(xs, x_share, axes.get_xscale() == "log"))
    axes.set_ylim(*_padded(ys, y_share, axes.get_yscale() == "log"))


def _padded(values: Sequence[float], share: float, log: bool) -> tuple[float, float]:
    found = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    low, high = min(found), max(found)
    if log:
        room = max(share * math.log(high / low), 0.2)
        return low / math.exp(room), high * math.exp(room)
    room = share * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def fixed_ticks(axis: Axis, places: Sequence[float], names: Sequence[str]) -> None:
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_major_formatter(FuncFormatter(lambda _, place: names[place] if place < len(names) else ""))
