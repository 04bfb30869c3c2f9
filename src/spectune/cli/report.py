"""`spectune report`: a comparison's files made anew from its runs."""

from pathlib import Path
from typing import Annotated

import typer

from spectune.cli import limits, options
from spectune.cli.console import note, print_answer, work
from spectune.cli.runs import RUNS, find_comparison
from spectune.errors import ConfigError
from spectune.files.lock import folder_lock


def report(
    context: typer.Context,
    folder: Annotated[
        Path | None, typer.Argument(help="A comparison's folder.", show_default="the newest under runs/")
    ] = None,
    max_memory: limits.MaxMemory = None,
    max_latency_overhead: limits.MaxLatencyOverhead = None,
    tenants: limits.Tenants = None,
    max_stored_bytes: limits.MaxStoredBytes = None,
    min_quality: limits.MinQuality = None,
    as_json: options.Json = False,
) -> None:
    """Rebuild a comparison from its runs: verdict, recommendation, table, page and plots.

    An interrupted comparison is shown as far as it went. Limits given here replace those it was made with.

    \b
    Examples:
      spectune report
      spectune report runs/2026-01-31-compare-1
      spectune report runs/2026-01-31-compare-1 --max-memory 16GiB --tenants 20
    """
    found = find_comparison(folder, "conditions.json")
    if found is None:
        raise ConfigError(
            f"there is no comparison under {RUNS.absolute()}. `spectune compare` makes one; or name its folder."
        )
    wanted = limits.fields(context)
    with work(as_json=as_json) as out:
        from spectune.comparing import Comparison
        from spectune.results import Limits

        with folder_lock(found, "spectune report"):
            comparison = Comparison.from_runs(found, Limits(**wanted) if wanted else None)
            comparison.save()
        out.print(comparison.table())
        gone = ", ".join(f"{run.name} seed {run.seed}" for run in comparison.result.missing)
        if gone:
            note(f"not run yet: {gone}. To go on: spectune compare --resume --output-dir {found}")
        note(f"written to {found}; the page: {found / 'report.html'}")
    print_answer({"folder": str(found), **comparison.to_dict()}, as_json=as_json)
