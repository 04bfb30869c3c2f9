"""The search for each method's learning rate: loss by rate, a small panel an arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from spectune.reporting import units
from spectune.reporting.plots.style import (
    INK,
    PAPER,
    Look,
    Plot,
    log_axis,
    looks,
    loss_axis,
    new_axes,
    new_figure,
    pad,
)
from spectune.reporting.words import joined

PANEL, TALL = 2.3, 1.8
COLUMNS = 4


def rate_plots(comparison: Mapping[str, Any]) -> list[Plot]:
    """A panel for each arm, for the page, and all of them in one figure, for the folder."""
    searches = {
        name: search for name, search in (comparison.get("searches") or {}).items() if _ended(search.get("trials"))
    }
    if not searches:
        return []
    look = looks(comparison)
    plots = []
    for number, (name, search) in enumerate(searches.items()):
        figure = new_figure(PANEL, TALL)
        panel = new_axes(figure, left=0.42, right=0.1, bottom=0.4, top=0.26)
        _panel(panel, search, look[name])
        plots.append(
            Plot(
                f"learning-rate-{number}",
                look[name].label,
                _sentence(search),
                figure,
                ["Learning rate", "Steps", "Validation loss"],
                [
                    [units.rate(t["learning_rate"]), str(t.get("steps", "-")), _outcome(t)]
                    for t in sorted(search["trials"], key=lambda t: (t.get("steps") or 0, t["learning_rate"]))
                ],
                in_folder=False,
            )
        )
    return [*plots, _together(searches, look)]


def _together(searches: Mapping[str, Mapping[str, Any]], look: Mapping[str, Look]) -> Plot:
    across = min(COLUMNS, len(searches))
    down = math.ceil(len(searches) / across)
    figure = new_figure(PANEL * across + 0.2, TALL * down + 0.2)
    width, height = figure.get_size_inches()
    for number, (name, search) in enumerate(searches.items()):
        left, bottom = 0.2 + PANEL * (number % across) + 0.42, height - TALL * (number // across + 1) + 0.4
        panel = figure.add_axes((left / width, bottom / height, (PANEL - 0.52) / width, (TALL - 0.66) / height))
        _panel(panel, search, look[name])
    figure.supylabel("validation loss, nats per target token", fontsize=8.5, x=0.004, ha="left")
    key = "dashed: the best rate; thin to thick: fewer to more steps; cross: failed"
    figure.supxlabel(f"learning rate (log)     {key}", fontsize=8.5, y=0.0, va="bottom")
    return Plot("learning-rates", "Learning rates", "", figure, [], [], in_page=False)


def _panel(axes: Axes, search: Mapping[str, Any], look: Look) -> None:
    trials = _ended(search["trials"])
    rungs = sorted({trial.get("steps") or 0 for trial in trials})
    xs, ys = [t["learning_rate"] for t in search["trials"]], [t["valid_loss"] for t in trials]
    log_axis(axes.xaxis, xs)
    axes.locator_params(axis="x", numticks=4)
    loss_axis(axes.yaxis, ys, "")
    axes.set_ylabel("")
    pad(axes, xs, ys, 0.08, 0.16)
    for number, rung in enumerate(rungs):
        strength = 0.35 + 0.65 * (number + 1) / len(rungs)
        placed = sorted((t["learning_rate"], t["valid_loss"]) for t in trials if (t.get("steps") or 0) == rung)
        axes.plot(*zip(*placed, strict=True), color=look.colour, linewidth=0.8 + 0.5 * number, alpha=strength)
        for trial in trials:
            if (trial.get("steps") or 0) == rung:
                axes.plot(
                    trial["learning_rate"],
                    trial["valid_loss"],
                    "o",
                    color=look.colour,
                    alpha=strength,
                    markersize=3.4,
                    markerfacecolor=PAPER if trial.get("extension") else look.colour,
                )
    best = search.get("best")
    if best is not None:
        axes.axvline(best, color=INK, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
    for trial in search["trials"]:
        if not _finite(trial.get("valid_loss")):
            axes.plot(
                trial["learning_rate"], 0.96, "x", color=INK, markersize=4.5, transform=axes.get_xaxis_transform()
            )
    axes.set_title(look.label, fontsize=8.5, loc="left", pad=5)
    axes.tick_params(labelsize=7)


def _sentence(search: Mapping[str, Any]) -> str:
    edge = search.get("edge")
    text = str(search.get("sentence") or f"Best: {units.rate(search.get('best'))}.")
    if edge and "edge" not in text:
        text += f" It lies on the {edge} edge of the range."
    steps = [f"{rung:,}" for rung in sorted({trial["steps"] for trial in search["trials"] if trial.get("steps")})]
    text = text if text.endswith(".") else f"{text}."
    return f"{text} Thin to thick: {joined(steps)} steps." if len(steps) > 1 else text


def _ended(trials: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    return [trial for trial in trials or () if _finite(trial.get("valid_loss")) and trial["learning_rate"] > 0]


def _outcome(trial: Mapping[str, Any]) -> str:
    loss = trial.get("valid_loss")
    return units.number(loss) if _finite(loss) else f"failed: {trial.get('reason') or 'no loss'}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
