"""The rows a command works on: the user's, or the embedded ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spectune.cli.console import note
from spectune.cli.runs import Run, UnknownBaseError, find_run, is_delta, model_as_it_is
from spectune.cli.settings import Settings
from spectune.errors import ConfigError, DataError, SpectuneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spectune.data import DataReport, Row, Rows, Source

    #: what names rows: a file, several with weights, or None for the embedded ones
    Data = str | list[Source] | None


def check_inputs(settings: Settings, methods: Sequence[str] = ()) -> None:
    """Check methods, keys, and that the base and the files that are named are there, without importing torch: what is
    mistyped is said at once. Raises ConfigError, DataError."""
    from spectune.data.reading import missing
    from spectune.files.local_folder import check_local

    settings.check(methods)
    check_local(settings.base)
    for key in ("data", "valid", "test"):
        rows = settings.rows(key)
        for path in [part.data for part in rows] if isinstance(rows, list) else [rows]:
            if path is not None and (problem := missing(path)) is not None:
                raise DataError(problem)
    retain = settings.text("retain")
    if retain is not None and not Path(retain).is_file():
        raise DataError(f"--retain {retain}: no such file; expected a text file")


def training_rows(settings: Settings) -> tuple[Rows, Rows, str]:
    """Training rows, validation rows, and a sentence that says where both came from. Raises DataError: a file is
    missing, empty or has bad rows, or there is but one row and no --valid."""
    from spectune import embedded
    from spectune.data import load_rows, split_rows

    data, valid, config = settings.rows("data"), settings.rows("valid"), settings.training()
    how = config.row_options
    if data is None:
        train = load_rows(embedded.TRAIN)
        held_out = load_rows(embedded.VALID) if valid is None else load_rows(valid, **how)
        return train, held_out, f"{len(train):,} rows of the embedded task, {len(held_out):,} for validation"
    rows = load_rows(data, **how)
    if valid is not None:
        held_out = load_rows(valid, **how)
        return (
            rows,
            held_out,
            f"{len(rows):,} rows of {named(data)}, {len(held_out):,} of {named(valid)} for validation",
        )
    seed = settings.whole("split_seed")
    seed = config.seed if seed is None else seed
    train, held_out = split_rows(rows, seed=seed)
    more = f"{len(held_out):,} more, drawn with seed {seed}, are held out for validation"
    return train, held_out, f"{len(train):,} rows of {named(data)}; {more}"


def named(data: Data) -> str:
    """A file, or several with their weights, for a sentence."""
    if isinstance(data, list):
        return ", ".join(f"{part.data}" + (f" x {part.weight:g}" if part.weight != 1 else "") for part in data)
    return str(data)


def rows_of(data: Data, part: Literal["training", "test"], how: Mapping[str, Any] | None = None) -> tuple[Rows, str]:
    """The rows of a file, or that part of the embedded ones; and their name. `how`: arguments of `load_rows`."""
    from spectune import embedded
    from spectune.data import load_rows

    if data is None:
        return load_rows(embedded.TRAIN if part == "training" else embedded.TEST), f"the embedded {part} rows"
    return load_rows(data, **(how or {})), named(data)


def rows_to_measure(data: str | None, run: Run) -> tuple[list[Row], str]:
    """Rows to compare two models on: the file's; else those that the run was judged on; else the embedded test rows;
    and their name."""
    if data is None:
        try:
            return rows_of_run(run)
        except SpectuneError as error:  # moved, or another working directory: no reason not to merge
            note(f"the run's validation rows are not to be had, so the embedded test rows are taken: {error}")
    return rows_of(data, "test", run.row_options)


def rows_of_run(run: Run) -> tuple[Rows, str]:
    """The rows that a run was judged on, and their name: the test rows of its comparison, else its validation rows.
    Of a model without a run the embedded test rows. Raises ConfigError: nothing says which they are. Raises DataError:
    they are not where they were."""
    from spectune import embedded
    from spectune.data import load_rows

    if run.delta_folder is None:
        return rows_of(None, "test")
    if not run.recorded:
        raise ConfigError(
            f"nothing in {run.folder} says which rows it was trained on: it was not made by a command, or is a delta "
            "alone. Name rows with --data"
        )
    recorded = Settings.collect(run.folder / "config.yaml", None, {})
    data, valid, test = (recorded.rows(key) for key in ("data", "valid", "test"))
    try:
        if test is not None or valid is not None:
            part = "test" if test is not None else "validation"
            judged = test if test is not None else valid
            return rows_of(judged, "test", run.row_options)[0], f"the run's {part} rows, {named(judged)}"
        if data is None:
            return load_rows(embedded.VALID), "the run's validation rows, of the embedded task"
        return training_rows(recorded)[1], f"the run's validation rows, held out of {named(data)}"
    except DataError as error:
        raise DataError(
            f"the rows that {run.folder} was judged on, as its config.yaml has them, cannot be read here: {error}\n"
            "Go to the folder that it was trained in, or name rows with --data."
        ) from error


def run_on(given: Path | None, model: str | None) -> Run:
    """The run that `--run` names, on the base that `--model` names, or its own; without `--run` the model as it is; and
    without either the newest run. Raises ConfigError, DataError: as `find_run`; a delta's folder that does not say its
    base needs `model`."""
    if model is not None:
        from spectune.files.local_folder import check_local

        check_local(model)
        if given is None:
            return model_as_it_is(model)
    try:
        found = find_run(given)
    except UnknownBaseError:
        if model is None or given is None or not is_delta(given):
            raise
        return Run(given, given, model, {}, {}, rebased=True)
    return found if model is None else dataclasses.replace(found, base=model, rebased=True)


def row_length(model: PreTrainedModel, wanted: int | None) -> int:
    """Tokens of a row: as wanted, else as training takes it where nobody says."""
    from spectune.inference import context_length
    from spectune.training.config import DEFAULT_LENGTH

    return wanted or min(context_length(model) or DEFAULT_LENGTH, DEFAULT_LENGTH)


def note_losses(report: DataReport, name: str) -> None:
    """Say on stderr which of the rows of this name are not learned as they were given: nothing is cut in silence."""
    if line := report.summary(name):
        note(f"{line}; --json names each")
