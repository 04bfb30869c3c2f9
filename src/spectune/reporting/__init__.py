"""Tables, figures and the page. This room reads results only."""

from spectune.reporting.plots import comparison_figure
from spectune.reporting.tables import comparison_html, comparison_table
from spectune.reporting.write import write_reports

__all__ = ["comparison_figure", "comparison_html", "comparison_table", "write_reports"]
