"""What has to be on the disk before a name may point at it."""

import contextlib
import os
from pathlib import Path
from typing import NoReturn


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until a folder's names are on the disk, where its file system can do that."""
    with contextlib.suppress(OSError):
        sync_file(path)


def sync_tree(folder: Path) -> None:
    """Files first, then the folders that name them, from the innermost on."""
    for path, _, files in os.walk(folder, topdown=False, onerror=_fail):
        for name in files:
            if not (file := Path(path, name)).is_symlink():
                sync_file(file)
        sync_folder(Path(path))


def _fail(error: OSError) -> NoReturn:
    raise error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and wait until the names of the new ones are on the disk."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)
