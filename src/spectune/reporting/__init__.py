"""Tables, figures and the page. This room reads results only."""

from spectune.reporting.files import write_reports
from spectune.reporting.html import comparison_html
from spectune.reporting.plots import comparison_figure
from spectune.reporting.rows import comparison_rows
from spectune.reporting.tables import comparison_table

__all__ = ["comparison_figure", "comparison_html", "comparison_rows", "comparison_table", "write_reports"]
