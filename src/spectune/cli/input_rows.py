"""The rows a command works on: the user's, or the embedded ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spectune.cli.console import note
from spectune.cli.runs import Run, find_run, is_delta
from spectune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spectune.data import DataReport, Row


def training_rows(
    data: str | None, valid: str | None, seed: int, skip_bad_rows: bool
) -> tuple[list[Row], list[Row], str]:
    """Training rows, validation rows, and a sentence that says where both came from. Raises DataError: a file is
    missing, empty or has bad rows, or there is but one row and no --valid."""
    from spectune import embedded
    from spectune.data import load_rows, split_rows

    if data is None:
        train = load_rows(embedded.TRAIN)
        held_out = load_rows(embedded.VALID if valid is None else valid, skip_bad_rows=skip_bad_rows)
        return train, held_out, f"{len(train):,} rows of the embedded task, {len(held_out):,} for validation"
    rows = load_rows(data, skip_bad_rows=skip_bad_rows)
    if valid is not None:
        held_out = load_rows(valid, skip_bad_rows=skip_bad_rows)
        return rows, held_out, f"{len(rows):,} rows of {data}, {len(held_out):,} of {valid} for validation"
    train, held_out = split_rows(rows, seed=seed)
    more = f"{len(held_out):,} more, drawn with seed {seed}, are held out for validation"
    return train, held_out, f"{len(train):,} rows of {data}; {more}"


def rows_of(data: str | None, part: Literal["training", "test"], skip_bad_rows: bool = False) -> tuple[list[Row], str]:
    """The rows of a file, or that part of the embedded ones; and their name."""
    from spectune import embedded
    from spectune.data import load_rows

    if data is None:
        return load_rows(embedded.TRAIN if part == "training" else embedded.TEST), f"the embedded {part} rows"
    return load_rows(data, skip_bad_rows=skip_bad_rows), data


def rows_to_measure(data: str | None, config: dict[str, Any]) -> tuple[list[Row], str]:
    """Rows to compare two models on: the file's; else those that the run with this `config.yaml` was validated on;
    else the embedded test rows; and their name."""
    trained_on, valid = config.get("data"), config.get("valid")
    if data is None and isinstance(trained_on or valid, str):
        skip, seed = bool(config.get("skip_bad_rows")), int(config.get("seed") or 0)
        try:
            if valid is not None:
                return rows_of(str(valid), "test", skip)
            held_out = training_rows(str(trained_on), None, seed, skip)[1]
            return held_out, f"the rows of {trained_on} that the run held out"
        except DataError as error:  # moved, or another working directory: no reason not to merge
            note(f"the run's validation rows are not to be had, so the embedded test rows are taken: {error}")
    return rows_of(data, "test")


def run_on(given: Path | None, model: str | None) -> Run:
    """The run that `--run` names, or the newest, on the base that `--model` names, or its own. Raises ConfigError,
    DataError: as `find_run`; a delta's folder that does not say its base needs `model`."""
    try:
        found = find_run(given)
    except DataError:
        if model is None or given is None or not is_delta(given):
            raise
        return Run(given, given, model, {}, {})
    return found if model is None else dataclasses.replace(found, base=model)


def row_length(model: PreTrainedModel, wanted: int | None) -> int:
    """Tokens of a row: as wanted, else as training takes it where nobody says."""
    from spectune.inference import context_length
    from spectune.training.prepare import DEFAULT_LENGTH

    return wanted or min(context_length(model) or DEFAULT_LENGTH, DEFAULT_LENGTH)


def note_losses(report: DataReport, name: str) -> None:
    """Say on stderr which of the rows of this name are not learned as they were given: nothing is cut in silence."""
    if line := report.summary(name):
        note(f"{line}; --json names each")
