"""A finished run that is taken as it is: whether all that it left is what it was when its result was written."""

import logging
from pathlib import Path

from spectune.deltas.folder import OUR_FILE
from spectune.errors import DataError
from spectune.files.metadata import SEAL, broken_seal, read_json
from spectune.results.vouched import BEST, FILES, FREE, problems_with, vouched_for
from spectune.storage.manifest import check_digests, read_manifest

log = logging.getLogger("spectune")

RESULT_FILE = "result.json"
#: judged rows, which whoever needs them looks at, and makes anew from the weights
ROWS_FILE = "rows.jsonl"


def check_finished(folder: Path) -> None:
    """Compare what a finished run left with what its result vouches for; of results of earlier versions, and of those
    whose keys were taken out, there is nothing to compare.

    Raises:
        DataError: a file was changed, damaged or removed; all of them are named, and what to do.
    """
    if problems := problems_of_run(folder, weights=True):
        result = folder / RESULT_FILE
        raise DataError(
            f"{folder}: the finished run there is not as it was written, and is not taken for finished. Remove "
            f"{result} and what is named here, and resume: the run goes on from its last checkpoint. Or, if it was "
            f"changed on purpose, take the keys {SEAL!r} and {FILES!r} out of {result}",
            problems,
        )


def problems_of_run(folder: Path, *, weights: bool, warned: bool = True) -> list[str]:
    """A line for each file of a finished run that is not as it was written, its judged rows left out.

    Args:
        weights: look at those in best/ too, by the digests of their own file.
        warned: a changed config.yaml, which may be meant, is logged, and not among them.
    """
    path = folder / RESULT_FILE
    content = read_json(path, what="a run's result", again="Remove it and resume") or {}
    digests = {name: digest for name, digest in vouched_for(path, content).items() if name != ROWS_FILE}
    if warned and FREE in digests:
        for problem in problems_with(folder, {FREE: digests.pop(FREE)}):
            log.warning("%s: changed since the run was finished, which may be meant", problem)
    found = problems_with(folder, digests)
    if weights:
        try:
            _check_weights(folder / BEST)
        except DataError as error:
            found += error.problems or [str(error)]
    return found + broken_seal(path, content)


def _check_weights(best: Path) -> None:
    manifest = read_manifest(best / OUR_FILE)
    if manifest is not None:
        check_digests(manifest[0], sorted(best.glob("*.safetensors")) or [best / "model.safetensors"])
