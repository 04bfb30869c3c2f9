"""`spectune compare`: many methods on one base and one data set, under one budget, measured alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectune.cli import options
from spectune.cli.console import complain, note, print_json, work
from spectune.cli.dry_run import dry_run
from spectune.cli.runs import origin, output_folder, resumed
from spectune.cli.settings import Settings
from spectune.errors import InterruptedRun, SpectuneError

if TYPE_CHECKING:
    from rich.console import Console

    from spectune.comparing import Comparison
    from spectune.deltas import Method

#: Steps of every run under --quick: enough for each method to fall below the bare base on the embedded task.
QUICK_STEPS = 120


def compare(
    model: options.Model = None,
    data: options.Data = None,
    valid: options.Valid = None,
    methods: Annotated[
        str | None,
        typer.Option(help=f"Methods, parted by commas: {options.method_names()}.", show_default="all of them"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"Six methods, {QUICK_STEPS} steps each.")] = False,
    retain: Annotated[
        Path | None,
        typer.Option(help="Text on which forgetting is measured.", show_default="sampled from the base itself"),
    ] = None,
    output_dir: options.OutputDir = None,
    config: options.Config = None,
    assignments: options.Set = None,
    seed: options.Seed = None,
    resume: options.Resume = False,
    dry: options.DryRun = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    skip_bad_rows: options.SkipBadRows = False,
    as_json: options.Json = False,
) -> None:
    """Train methods one after another on the same rows, steps and batches, and put their measurements side by side.

    Parameters, memory, loss, forgetting, speed of training and decoding, bytes on disk: as a table here, and as JSON,
    CSV, Markdown and a figure in the run's folder. Exit code 1 if any run failed; the others are still compared.

    \b
    Examples:
      spectune compare --quick
      spectune compare --model gpt2 --data train.jsonl --methods full,lora,bitfit --set max_steps=500
      spectune compare --config run.yaml --set lora.r=8 --output-dir runs/ranks
    """
    flags = {
        "model": model,
        "data": data,
        "valid": valid,
        "methods": methods,
        "retain": retain,
        "output_dir": output_dir,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "skip_bad_rows": skip_bad_rows or None,
        "resume": resume or None,
    }
    settings = Settings.collect(config, assignments, flags)
    if quick:
        settings.prefer("max_steps", QUICK_STEPS, "--quick")
    settings = resumed(settings)
    failed = False
    with work(as_json=as_json) as out:
        from spectune.methods import BY_NAME, SPECTRUM

        default = [str(method.model_fields["name"].default) for method in SPECTRUM] if quick else list(BY_NAME)
        chosen = settings.methods(settings.method_names(default))
        if dry:
            answer = dry_run(chosen, settings, "compare", out)
        else:
            comparison = _compare(chosen, settings, out)
            answer, failed = {"folder": str(comparison.folder), **comparison.to_dict()}, bool(comparison.failed)
            out.print(comparison.table())
            for run in comparison.failed:
                complain(f"{run['method']} failed: {run['reason']}")
            note(f"written to {comparison.folder}")
    if as_json:
        print_json(answer)
    if failed:
        raise typer.Exit(SpectuneError.exit_code)


def _compare(methods: list[Method], settings: Settings, out: Console) -> Comparison:
    from spectune import comparing, embedded

    wanted = settings.training()
    folder = output_folder(settings.text("output_dir"), "compare", resume=wanted.resume)
    data, valid = settings.text("data"), settings.text("valid")
    if data is None:
        data, valid = str(embedded.TRAIN), valid or str(embedded.VALID)
    note(f"base: {settings.base}; methods: {', '.join(method.name for method in methods)}; folder: {folder}")
    try:
        return comparing.compare(
            settings.base,
            data,
            valid,
            methods=methods,
            output_dir=folder,
            config=wanted,
            seed=wanted.seed,
            device=settings.device,
            dtype=settings.dtype,
            retain=settings.text("retain"),
            resume=wanted.resume,
            origin=origin(settings),
            console=out,
        )
    except (InterruptedRun, KeyboardInterrupt) as stop:
        raise InterruptedRun(
            f"the comparison is in {folder}. To go on: the same command with --output-dir {folder} --resume"
        ) from stop
