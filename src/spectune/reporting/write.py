"""The files that are made from a comparison."""

import io
import warnings
from pathlib import Path

from matplotlib.figure import Figure

from spectune.files.atomic import atomic_write_bytes, sweep
from spectune.files.disk_errors import disk_errors
from spectune.reporting.page import comparison_page
from spectune.reporting.plots import comparison_figure, comparison_plots, figure_style
from spectune.reporting.spreadsheets import comparison_csv, runs_csv
from spectune.reporting.tables import comparison_markdown
from spectune.results.comparison_file import ComparisonResult

FIGURE = "shares-and-performance"
PLOTS = "plots"
DPI = 160


def write_reports(comparison: ComparisonResult, folder: str | Path) -> list[Path]:
    """Write everything that is made from a comparison and from what its runs left in the folder. Returns the paths.

    `comparison.csv` (a line an arm), `runs.csv` (a line a run), `comparison.md`, `report.html` (one file that needs
    nothing else), `shares-and-performance.svg` and `.png`, and the page's figures as SVG and PNG under `plots/`. Each
    file is written atomically; the same comparison gives the same bytes.

    Raises:
        WriteError: the disk is full, read-only or broken.
    """
    folder = Path(folder)
    for place in (folder, folder / PLOTS):
        sweep(place)
    contents: dict[str, bytes] = {
        "comparison.csv": _bytes(comparison_csv(comparison)),
        "runs.csv": _bytes(runs_csv(comparison)),
        "comparison.md": _bytes(comparison_markdown(comparison) + f"\n![figure]({FIGURE}.svg)\n"),
    }
    with figure_style(), warnings.catch_warnings():
        # a label in a script that the figures' font lacks: boxes in the PNG; the page has fonts of its own
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        drawn = [(plot, _saved(plot.figure, "svg")) for plot in comparison_plots(comparison, folder)]
        for plot, svg in drawn:
            if plot.in_folder:
                contents[f"{PLOTS}/{plot.name}.svg"] = svg
                contents[f"{PLOTS}/{plot.name}.png"] = _saved(plot.figure, "png")
        figure = comparison_figure(comparison)
        contents |= {f"{FIGURE}.{kind}": _saved(figure, kind) for kind in ("svg", "png")}
    svgs = [(plot, svg.decode()) for plot, svg in drawn]
    contents["report.html"] = _bytes(comparison_page(comparison, folder, svgs))
    with disk_errors(folder, "What was measured is whole: spectune report makes these files again."):
        for name, content in contents.items():
            atomic_write_bytes(folder / name, content)
    return [folder / name for name in contents]


def _saved(figure: Figure, kind: str) -> bytes:
    out = io.BytesIO()
    # no date: the same comparison gives the same bytes
    figure.savefig(out, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")
