"""The figures of a comparison."""

from pathlib import Path

from spectune.reporting.plots.curves import data_plot, learning_plot
from spectune.reporting.plots.order import difference_plot, order_plot
from spectune.reporting.plots.rates import rate_plots
from spectune.reporting.plots.shares import comparison_figure
from spectune.reporting.plots.style import Plot, figure_style
from spectune.reporting.plots.trade_offs import forgetting_plot, quality_plots
from spectune.results.comparison_file import ComparisonResult


def comparison_plots(comparison: ComparisonResult, folder: Path) -> list[Plot]:
    """Every figure that the comparison, and the runs under its folder, have numbers for."""
    with figure_style():
        found = [order_plot(comparison), difference_plot(comparison), *quality_plots(comparison)]
        found += [learning_plot(comparison, folder), *rate_plots(comparison)]
        found += [forgetting_plot(comparison), data_plot(comparison)]
    return [plot for plot in found if plot is not None]


__all__ = ["Plot", "comparison_figure", "comparison_plots", "figure_style"]
