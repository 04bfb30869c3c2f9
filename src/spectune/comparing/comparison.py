"""What a comparison found: shows itself as a table and a figure, and lies on disk as JSON, CSV and Markdown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectune.comparing.advising.limits import Limits
from spectune.comparing.assemble import assemble
from spectune.errors import DataError
from spectune.files.strict_json import strict_json
from spectune.reporting import comparison_figure, comparison_html, comparison_table, write_reports
from spectune.storage import atomic_write_text

FILE = "comparison.json"


@dataclass(frozen=True)
class Comparison:
    """The results of one comparison.

    Attributes:
        folder: where it lies, with `runs/`, `comparison.json`, `.csv`, `.md` and the figure.
        content: what `comparison.json` holds: base, data, settings, preset, arms, searches, runs, curves, failed,
            verdict, recommendation.
    """

    folder: Path
    content: dict[str, Any]

    @property
    def runs(self) -> list[dict[str, Any]]:
        """One result for each run that ended, as in `result.json`."""
        return list(self.content["runs"])

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Method and reason of each run that did not end."""
        return list(self.content["failed"])

    def to_dict(self) -> dict[str, Any]:
        return self.content

    def table(self) -> Any:
        """The table, as a rich renderable: `rich.print(comparison.table())`."""
        return comparison_table(self.content)

    def plot(self) -> Any:
        """The figure, a `matplotlib.figure.Figure` of two panels."""
        return comparison_figure(self.content)

    def _repr_html_(self) -> str:
        return comparison_html(self.content)

    def save(self) -> None:
        """Write `comparison.json` and everything that is made from it."""
        atomic_write_text(self.folder / FILE, strict_json(self.content) + "\n")
        write_reports(self.content, self.folder)

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
        folder = Path(folder)
        try:
            content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / FILE} cannot be read as a comparison: {error}") from error
        return cls(folder, content)
