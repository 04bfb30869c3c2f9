"""The functions of the room on a comparison's content as its file has it, which tests change as they like."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from spectune import reporting
from spectune.reporting import plots, spreadsheets, tables
from spectune.reporting.page import examples as page_examples
from spectune.results import ComparisonResult, arm_result

T = TypeVar("T")


def _of_content(function: Callable[..., T]) -> Callable[..., T]:
    return lambda content, *more: function(ComparisonResult.model_validate(content), *more)


arm_results = _of_content(arm_result.arm_results)
comparison_csv = _of_content(spreadsheets.comparison_csv)
comparison_figure = _of_content(reporting.comparison_figure)
comparison_html = _of_content(reporting.comparison_html)
comparison_markdown = _of_content(tables.comparison_markdown)
comparison_plots = _of_content(plots.comparison_plots)
comparison_table = _of_content(reporting.comparison_table)
examples = _of_content(page_examples.examples)
runs_csv = _of_content(spreadsheets.runs_csv)
write_reports = _of_content(reporting.write_reports)
