"""What an earlier call left in a comparison's folder: whether it is as it was written, before any of it is taken over.

A resumption refuses what was changed; a report shows it, and says so.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from spectune.comparing import conditions
from spectune.comparing.conditions import RecordedConditions
from spectune.errors import DataError
from spectune.files.digests import Digest
from spectune.files.metadata import SEAL, broken_seal, read_json
from spectune.results.vouched import FILES, FREE, digests_in, problems_with, vouched_for
from spectune.training.finished import RESULT_FILE, ROWS_FILE, problems_of_run

log = logging.getLogger("spectune")

PASSAGES_FILE = "passages.json"


def base_folder(track: str) -> str:
    """Of the bare base's rows, within a comparison's; `track`: see `Job`."""
    return "base" if not track else f"base-{track}"


def vouched_files(folder: Path, found: RecordedConditions) -> dict[str, Digest]:
    """The files that a comparison's conditions vouch for, as they are now: rows of bases that have been judged."""
    tracks = [track for track, base in {"": found.base, **found.other_bases}.items() if base.judged_loss is not None]
    names = [f"{base_folder(track)}/{name}" for track in tracks for name in (ROWS_FILE, PASSAGES_FILE)]
    return {name: Digest(**digest) for name, digest in digests_in(folder, [FREE, *names]).items()}


def check_intact(folder: Path, arms: Sequence[str]) -> None:
    """Compare the conditions, the bare base's rows and the finished runs of the arms with what they were when they were
    written. What is gone is made anew, and no fault.

    Raises:
        DataError: all that was changed or damaged is named, and what to remove to have it done again.
    """
    problems = list(_problems(folder, weights=True, arms=arms))
    if not problems:
        return
    raise DataError(
        f"{folder}: what an earlier call left is not as it was written, and nothing is taken over. Remove the files of "
        f"base/ that are named here, and {RESULT_FILE} of the runs that are, with the files beside it, and go on with "
        "--resume: they are made again, and all others are kept. Where something was changed on purpose, take the keys "
        f"{SEAL!r} and {FILES!r} out of the JSON file that has them",
        problems,
    )


def changed_since(folder: Path) -> list[str]:
    """A line for each file of a comparison that is not as it was written, weights left out: for a report, which shows
    it all the same."""
    return list(_problems(folder, weights=False))


def rows_as_written(folder: Path) -> bool:
    """Whether the judged rows of a run are those that its result was written after."""
    digests = vouched_for(folder / RESULT_FILE)
    return ROWS_FILE not in digests or not problems_with(folder, {ROWS_FILE: digests[ROWS_FILE]})


def _problems(folder: Path, *, weights: bool, arms: Sequence[str] | None = None) -> Iterator[str]:
    """`arms`: those that are asked for, of which what is gone is made anew; None: whatever is there is looked at."""
    path = folder / conditions.FILE
    content = read_json(path) or {}
    digests = vouched_for(path, content)
    if (config := digests.pop(FREE, None)) is not None and (folder / FREE).exists():
        for problem in problems_with(folder, {FREE: config}):
            if arms is None:
                yield problem
            else:
                log.warning("%s: changed since the comparison was made, which may be meant", problem)
    resumed = arms is not None
    yield from problems_with(folder, {n: d for n, d in digests.items() if not resumed or (folder / n).exists()})
    yield from broken_seal(path, content)
    for result in sorted((folder / "runs").glob(f"*/*/{RESULT_FILE}")):
        if resumed and result.parent.parent.name not in (arms or ()):
            continue
        try:
            yield from problems_of_run(result.parent, weights=weights, warned=resumed)
            if not resumed and not rows_as_written(result.parent):
                yield f"{result.parent / ROWS_FILE}: is not as it was written"
        except DataError as error:
            if resumed:
                yield str(error)  # a report reads the same file, and stops at it
