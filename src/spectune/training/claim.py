"""A folder for one run or comparison alone: locked before anything in it is read, and swept of what a kill left."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from spectune.errors import ConfigError
from spectune.files.atomic import remove_folder, sweep
from spectune.files.lock import LOCK_FILE, folder_lock

#: names that earlier versions wrote under, of a checkpoint, of the best weights and of the link to them
_EARLIER = re.compile(
    r"\.(checkpoint|best)-[0-9]{1,18}\.(old\.)?[a-z0-9_]{8}|\.best\.[0-9]+|\.end\.safetensors\.[0-9]+", re.ASCII
)
#: folders in a run's
OF_RUN = ("tensorboard",)


@contextlib.contextmanager
def claimed(folder: Path, doing: str, *, resume: bool, within: Sequence[str] = OF_RUN) -> Iterator[None]:
    """Have a folder for oneself, while inside. One that is not there is made, with those above it, and they are taken
    away again where nothing was written.

    Args:
        doing: what is done there, for who is refused: "spectune train".
        resume: what is there already is gone on with.
        within: folders in it that are swept too, as patterns of `Path.glob`.

    Raises:
        ConfigError: it is a file, or not empty without `resume`.
        BusyFolderError: another process has it.
        WriteError: the disk is full, read-only or broken.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; expected a folder, or a name that is free")
    if not (folder / LOCK_FILE).exists():  # who has it is said first
        check_empty(folder, resume)
    above = [place for place in folder.parents if not place.exists()]
    try:
        with folder_lock(folder, doing):
            check_empty(folder, resume)
            for place in (folder, *(place for pattern in within for place in folder.glob(pattern))):
                _sweep(place)
            yield
    finally:
        for place in above:
            with contextlib.suppress(OSError):  # there is something in it
                place.rmdir()


def check_empty(folder: Path, resume: bool) -> None:
    """Raises ConfigError where there is something in a folder, without `resume`."""
    if not resume and folder.is_dir() and any(entry.name != LOCK_FILE for entry in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give another --output-dir, or --resume to go on there")


def _sweep(folder: Path) -> None:
    """Remove what a kill left while it was being written."""
    if not folder.is_dir() or folder.is_symlink():
        return
    sweep(folder)
    for entry in list(folder.iterdir()):
        if _EARLIER.fullmatch(entry.name):  # nobody else is here
            remove_folder(entry)
