"""The search for each method's learning rate: loss by rate, a small panel an arm."""

import math
from collections.abc import Mapping

from matplotlib.axes import Axes

from spectune.reporting import units
from spectune.reporting.plots.style import INK, PAPER, Look, Plot, log_axis, looks, loss_axis, new_axes, new_figure, pad
from spectune.results.arm_result import is_finite
from spectune.results.comparison_file import ComparisonResult, Search, Trial
from spectune.results.phrases import listed

PANEL, TALL = 2.3, 1.8
COLUMNS = 4


def rate_plots(comparison: ComparisonResult) -> list[Plot]:
    """A panel for each arm, for the page, and all of them in one figure, for the folder."""
    searches = {name: search for name, search in comparison.searches.items() if _ended(search)}
    if not searches:
        return []
    look = looks(comparison)
    plots = []
    for number, (name, search) in enumerate(searches.items()):
        figure = new_figure(PANEL, TALL)
        panel = new_axes(figure, left=0.42, right=0.1, bottom=0.4, top=0.26)
        _panel(panel, search, look[name])
        header, body = ["Learning rate", "Steps", "Validation loss"], []
        for t in sorted(search.trials, key=lambda t: (t.steps, t.learning_rate)):
            loss = units.number(t.valid_loss) if is_finite(t.valid_loss) else f"failed: {t.reason or 'no loss'}"
            body.append([units.rate(t.learning_rate), str(t.steps or units.MISSING), loss])
        words = _sentence(search)
        plots.append(Plot(f"learning-rate-{number}", look[name].label, words, figure, header, body, in_folder=False))
    unit = comparison.data.loss_unit if comparison.decided_by_loss else "of each arm's own kind"
    return [*plots, _together(searches, look, unit)]


def _together(searches: Mapping[str, Search], look: Mapping[str, Look], unit: str) -> Plot:
    across = min(COLUMNS, len(searches))
    down = math.ceil(len(searches) / across)
    figure = new_figure(PANEL * across + 0.2, TALL * down + 0.2)
    width, height = figure.get_size_inches()
    for number, (name, search) in enumerate(searches.items()):
        left, bottom = 0.2 + PANEL * (number % across) + 0.42, height - TALL * (number // across + 1) + 0.4
        panel = figure.add_axes((left / width, bottom / height, (PANEL - 0.52) / width, (TALL - 0.66) / height))
        _panel(panel, search, look[name])
    figure.supylabel(f"validation loss, {unit}", fontsize=8.5, x=0.004, ha="left")
    key = "dashed: the best rate; thin to thick: fewer to more steps; cross: failed"
    figure.supxlabel(f"learning rate (log)     {key}", fontsize=8.5, y=0.0, va="bottom")
    return Plot("learning-rates", "Learning rates", "", figure, [], [], in_page=False)


def _panel(axes: Axes, search: Search, look: Look) -> None:
    ended = _ended(search)
    rungs = sorted({trial.steps for trial, _ in ended})
    xs, ys = [trial.learning_rate for trial in search.trials], [loss for _, loss in ended]
    log_axis(axes.xaxis, xs)
    axes.locator_params(axis="x", numticks=4)
    loss_axis(axes.yaxis, ys, "")
    axes.set_ylabel("")
    pad(axes, xs, ys, 0.08, 0.16)
    for number, rung in enumerate(rungs):
        strength = 0.35 + 0.65 * (number + 1) / len(rungs)
        placed = [(trial, loss) for trial, loss in ended if trial.steps == rung]
        line = sorted((trial.learning_rate, loss) for trial, loss in placed)
        axes.plot(*zip(*line, strict=True), color=look.colour, linewidth=0.8 + 0.5 * number, alpha=strength)
        for trial, loss in placed:
            fill = PAPER if trial.extension else look.colour
            [dot] = axes.plot(trial.learning_rate, loss, "o", color=look.colour, alpha=strength)
            dot.set(markersize=3.4, markerfacecolor=fill)
    if search.best is not None:
        axes.axvline(search.best, color=INK, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
    for trial in search.trials:
        if not is_finite(trial.valid_loss):
            axes.plot(trial.learning_rate, 0.96, "x", color=INK, markersize=4.5, transform=axes.get_xaxis_transform())
    axes.set_title(look.label, fontsize=8.5, loc="left", pad=5)
    axes.tick_params(labelsize=7)


def _sentence(search: Search) -> str:
    text = search.sentence or f"Best: {units.rate(search.best)}."
    if search.edge and "edge" not in text:
        text += f" It lies on the {search.edge} edge of the range."
    steps = [f"{rung:,}" for rung in sorted({trial.steps for trial in search.trials if trial.steps})]
    text = text if text.endswith(".") else f"{text}."
    return f"{text} Thin to thick: {listed(steps)} steps." if len(steps) > 1 else text


def _ended(search: Search) -> list[tuple[Trial, float]]:
    """The trials that can be drawn, with their losses."""
    return [(t, t.valid_loss) for t in search.trials if is_finite(t.valid_loss) and t.learning_rate > 0]
