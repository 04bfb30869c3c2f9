"""The flags of `spectune generate` that are for files of requests, and what they make of the command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from spectune.cli.console import note, print_answer, work
from spectune.errors import ConfigError, DataError
from spectune.sizes import bytes_of

#: flags that say something to a file's requests alone, and those that a file has no use for
_THEIRS = {"deltas": "--deltas", "resume": "--resume", "device_memory": "--device-memory"}
_OTHERS = {"prompts": "prompts", "data": "--data", "rows": "--rows"}


def wants_files(given: Mapping[str, Any]) -> bool:
    """Whether the command's flags ask for a file's requests. Raises ConfigError: some of them do, and others do not."""
    source, output = given["source"], given["output"]
    if source is None and output is None:
        if wrong := [flag for name, flag in _THEIRS.items() if given[name]]:
            raise ConfigError(f"{wrong[0]} is for files of requests: give --input and --output, too")
        return False
    if source is None or output is None:
        raise ConfigError("--input and --output go together: requests are read there, and answers written here")
    if wrong := [flag for name, flag in _OTHERS.items() if given[name]]:
        raise ConfigError(f"with --input, requests come from that file: leave out {wrong[0]}")
    return True


def answer_file(given: Mapping[str, Any]) -> None:
    """Answer a file's requests, and say what became of them; exit code 1 where some have no answer."""
    source, output = Path(given["source"]), Path(given["output"])
    _check(source, output)
    memory = bytes_of(given["device_memory"] or "2GiB", "--device-memory")
    as_json = given["as_json"]
    with work(as_json=as_json):
        from spectune.cli.batch import Batch, answered
        from spectune.data.requests import How

        usual = How.of(given)
        place = {key: given[key] for key in ("base_precision", "trust_remote_code", "allow_missing_weights")}
        place |= {"device": given["device"] or "auto", "dtype": given["dtype"] or "auto"}
        where = (given["run"], given["model"], given["deltas"])
        found = answered(Batch(source, output, given["resume"], *where, usual, memory, place))
        if found["failed"]:
            note(f"{found['failed']:,} of {found['lines']:,} requests failed: their lines in {output} have `error`")
        else:
            note(f"all {found['lines']:,} requests are answered in {output}")
    print_answer({"output": str(output), **found}, as_json=as_json)
    if found["failed"]:
        raise typer.Exit(1)


def _check(source: Path, output: Path) -> None:
    from spectune.data.reading import missing

    if (problem := missing(str(source))) is not None:
        raise DataError(f"--input {problem}")
    if output.exists() and source.exists() and output.samefile(source):
        raise ConfigError(f"--output {output} is --input: choose another name")
