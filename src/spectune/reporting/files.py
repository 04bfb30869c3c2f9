"""The files that are made from a comparison."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from spectune.reporting.plots import comparison_figure
from spectune.reporting.tables import comparison_csv, comparison_markdown

FIGURE = "shares-and-performance"


def write_reports(comparison: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write `comparison.csv`, `comparison.md` and the figure as SVG and PNG, each atomically. Returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, bytes] = {
        "comparison.csv": comparison_csv(comparison).encode(),
        "comparison.md": (comparison_markdown(comparison) + f"\n![figure]({FIGURE}.svg)\n").encode(),
    }
    # a fixed salt and no date: the same comparison gives the same bytes
    with rc_context({"svg.hashsalt": "spectune", "svg.fonttype": "none"}):
        figure = comparison_figure(comparison)
        for kind in ("svg", "png"):
            out = io.BytesIO()
            figure.savefig(out, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
            contents[f"{FIGURE}.{kind}"] = out.getvalue()
    return [_write(folder / name, content) for name, content in contents.items()]


def _write(path: Path, content: bytes) -> Path:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
