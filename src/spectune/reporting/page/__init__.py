"""The page: everything that a comparison found, in one file that needs nothing else."""

from spectune.reporting.page.page import comparison_page

__all__ = ["comparison_page"]
