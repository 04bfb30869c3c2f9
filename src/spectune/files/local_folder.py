"""A base that is named by a path: what is wrong with it is said before anything is imported or asked for on the hub."""

import os
from pathlib import Path

from spectune.errors import DataError, did_you_mean


def check_local(name: str) -> None:
    """Raise DataError where `name` is a local path at which there is no folder. `owner/name` may be the hub's, and says
    nothing here."""
    try:
        path = Path(name).expanduser()
        there, folder = path.exists(), path.is_dir()
    except (OSError, ValueError, RuntimeError):  # whatever it is, no path
        return
    if folder:
        return
    if there:
        raise DataError(f"the base {name!r} is a file; expected a folder with config.json, weights and tokenizer")
    if not _is_path(name):
        return
    near = did_you_mean(path.name, (inner.name for inner in _folders(path.parent)))
    beside = near or ("" if path.parent.is_dir() else f" (there is no folder {path.parent} either)")
    raise DataError(
        f"the base {name!r} is a local path, and there is no such folder in {Path.cwd()}{beside}; expected a folder "
        "with config.json, weights and tokenizer"
    )


def _is_path(name: str) -> bool:
    """Whether a name can only be a local path's: the hub's have one slash at most, and do not begin with one."""
    return name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count("/") > 1 or "\\" in name


def _folders(place: Path) -> list[Path]:
    try:
        return [inner for inner in place.iterdir() if inner.is_dir()]
    except OSError:
        return []
