"""The files that a run's result vouches for: what they were when the result, which makes them count, was written."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from spectune.errors import DataError
from spectune.files.digests import Digest, check_files, digest_of
from spectune.files.metadata import first_problem, read_json
from spectune.files.regular import inside

#: the key in a record: digests by path below the record's folder
FILES = "files"
#: of a run's folder. The weights in best/ are vouched for by its own spectune.json, which is among these
OF_RUN = ("config.yaml", "identity.json", "environment.json", "data_report.json", "metrics.jsonl", "rows.jsonl")
BEST, END_FILE = "best", "end.safetensors"
#: what the user may have changed on purpose: a warning says so
FREE = "config.yaml"
_WEIGHTS = ".safetensors"
_DIGESTS = TypeAdapter(dict[str, Digest])


def digests_in(folder: Path, names: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """The digests of those of the files that are there, for a record. Raises OSError."""
    return {name: digest_of(folder / name).record() for name in names if (folder / name).is_file()}


def digests_of_run(folder: Path) -> dict[str, Any]:
    """The digests of a finished run's files, for its result. Raises OSError."""
    best = sorted(path for path in (folder / BEST).rglob("*") if path.is_file() and path.suffix != _WEIGHTS)
    return digests_in(folder, [*OF_RUN, END_FILE, *(str(path.relative_to(folder)) for path in best)])


def vouched_for(record: Path, content: Mapping[str, Any] | None = None) -> dict[str, Digest]:
    """The digests in a record, by path; none of earlier versions'. Raises DataError: they are damaged, or of files
    elsewhere."""
    found = read_json(record) if content is None else content
    try:
        digests = _DIGESTS.validate_python((found or {}).get(FILES) or {})
    except ValidationError as error:
        raise DataError(f"{record}: its key {FILES!r} is no list of digests ({first_problem(error)})") from error
    if outside := [name for name in digests if inside(record.parent, name) is None]:
        raise DataError(f"{record}: its key {FILES!r} names {outside[0]!r}, which is not in its folder")
    return digests


def problems_with(folder: Path, digests: Mapping[str, Digest]) -> list[str]:
    """A line for each file that is not as it was written; gone is not as it was, too."""
    by_folder: dict[Path, dict[str, Digest]] = defaultdict(dict)
    for name, digest in digests.items():
        by_folder[(folder / name).parent][Path(name).name] = digest
    found: list[str] = []
    for place, files in sorted(by_folder.items()):
        try:
            check_files(place, files, "")
        except DataError as error:
            found += [f"{place / line}" for line in error.problems]
    return found
