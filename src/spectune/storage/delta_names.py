"""Which folder a delta's name means: one in a folder of many, a path, or a hub id."""

import hashlib
import os
import re
from pathlib import Path

from spectune.deltas.folder import CONFIG_FILE, OUR_FILE
from spectune.errors import ConfigError, DataError, did_you_mean, first_line, some

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+")
#: what is fetched of a hub's repository: what a folder is read by, and never a pickle
_FETCHED = ("*.json", "*.safetensors")


class DeltaNames:
    """The deltas of one folder, each a folder in it; None has none. Other names are paths, or hub ids. Raises
    ConfigError: it is no folder."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is not a folder; expected one that holds deltas' folders")

    def all(self) -> list[str]:
        """As the folder is now, in no order."""
        if self.folder is None:
            return []
        with os.scandir(self.folder) as entries:
            return [entry.name for entry in entries if _holds_a_delta(entry.path)]

    def __contains__(self, name: str) -> bool:
        inside = self._inside(name)
        return inside is not None and _holds_a_delta(inside)

    def folder_of(self, name: str) -> Path:
        """Where a delta lies; what is on the hub is fetched. Raises DataError: there is none of that name."""
        inside = self._inside(name)
        if inside is not None and os.path.isdir(inside):  # False for what no path can be
            return inside
        if os.path.exists(name):
            return Path(name)
        if _HUB_ID.fullmatch(name):
            return _fetched(name)
        known = sorted(self.all())
        where = f"{self.folder} holds {some(known) or 'none'}" if self.folder is not None else "no folder was given"
        raise DataError(
            f"no delta {name[:80]!r}{did_you_mean(name, known)}: {where}; and it is neither a path nor a hub id"
        )

    def _inside(self, name: str) -> Path | None:
        """The place of this name in the folder; None where the name leads out of it."""
        alone = name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
        return self.folder / name if self.folder is not None and alone else None


def key_of(name: str) -> str:
    """What a delta of this name is called on the model: by itself, or something like it where that cannot be."""
    if _PLAIN.fullmatch(name):
        return name
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.")[-40:]
    return f"{plain}.{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def _holds_a_delta(path: str | Path) -> bool:
    return any(os.path.isfile(os.path.join(path, file)) for file in (OUR_FILE, CONFIG_FILE))


def _fetched(name: str) -> Path:
    """The folder of a hub's repository, out of the hub's cache where it cannot be reached. Raises DataError."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FETCHED)))
    except Exception as error:  # the library's own kinds, and those of what it uses
        raise DataError(
            f"no delta {name!r}: it is no folder, and not to be had from the hub ({first_line(error)}). Give the "
            "folder, or check the id, the network and HF_TOKEN"
        ) from error
