"""The results of a comparison: shown as a table and a figure, saved as JSON, CSV, Markdown and a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectune.comparing.assemble import assemble
from spectune.reporting import comparison_figure, comparison_html, comparison_table, write_reports
from spectune.results import ComparisonResult, Limits


@dataclass(frozen=True)
class Comparison:
    """The results of one comparison.

    Attributes:
        folder: its folder, with `runs/`, `comparison.json`, `.csv`, `.md` and the figure.
        result: what `comparison.json` holds, typed.
    """

    folder: Path
    result: ComparisonResult

    @property
    def content(self) -> dict[str, Any]:
        """What `comparison.json` holds: base, data, settings, preset, arms, searches, runs, curves, failed, verdict,
        recommendation."""
        return self.result.to_dict()

    @property
    def runs(self) -> list[dict[str, Any]]:
        """One result for each run that ended, as in `result.json`."""
        return [run.to_dict() for run in self.result.runs]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Method and reason of each run that did not end."""
        return [failure.to_dict() for failure in self.result.failed]

    def to_dict(self) -> dict[str, Any]:
        return self.content

    def table(self) -> Any:
        """The table, as a rich renderable: `rich.print(comparison.table())`."""
        return comparison_table(self.result)

    def plot(self) -> Any:
        """The figure, a `matplotlib.figure.Figure` of two panels."""
        return comparison_figure(self.result)

    def _repr_html_(self) -> str:
        return comparison_html(self.result)

    def save(self) -> None:
        """Write `comparison.json` and everything that is made from it."""
        self.result.save(self.folder)
        write_reports(self.result, self.folder)

    @classmethod
    def from_runs(cls, folder: str | Path, limits: Limits | None = None) -> Comparison:
        """The comparison made anew from the runs in its folder, also of one that was interrupted.

        Raises:
            DataError: the folder holds no comparison, or a result in it is damaged.
        """
        return cls(Path(folder), assemble(Path(folder), limits))

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """The comparison in a folder. Raises DataError where there is none."""
        return cls(Path(folder), ComparisonResult.load(Path(folder)))
