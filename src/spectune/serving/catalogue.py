"""The names that a request may give as `model`: the base's, and those of deltas."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectune.data.asking import PromptForm
from spectune.errors import ConfigError

#: a delta's folder has one of them
_FILES = ("spectune.json", "adapter_config.json")
#: what a folder in `deltas` is called that is served
_NAME = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,254}")


@dataclass(frozen=True)
class Entry:
    """A model that is served.

    Attributes:
        delta: its folder, which is its name in the bank; None of the base.
        created: seconds since 1970.
        version: is another one when the folder's files are.
    """

    name: str
    delta: str | None
    created: int
    version: int = 0


@dataclass
class Catalogue:
    """What is served under which name.

    A folder that comes into `deltas` while the server runs is served from then on, and as it is then. What a client
    writes is the name of a folder there, and never a path.

    Args:
        base: its name.
        deltas: a folder of deltas and runs, each served under its folder's name.
        named: more of them, by name.
        settings_of: how the rows that a delta was trained on were made into prompts, as its files have it. Raises
            DataError.
        base_settings: the same for the base.
    """

    base: str
    deltas: Path | None = None
    named: Mapping[str, Path] = field(default_factory=dict)
    settings_of: Callable[[Path], Mapping[str, Any]] = lambda folder: {}
    base_settings: Mapping[str, Any] = field(default_factory=dict)
    _began: int = field(default_factory=lambda: int(time.time()), init=False)
    _forms: dict[str, tuple[int, PromptForm]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if taken := [name for name in (*self.named, *self._folders()) if name == self.base]:
            raise ConfigError(f"a delta and the base are both called {taken[0]!r}; rename the delta's folder")

    @property
    def has_deltas(self) -> bool:
        """Whether deltas are served beside the base, or may come to be."""
        return bool(self.named) or self.deltas is not None

    def names(self, most: int | None = None) -> list[str]:
        """The base's, and those of folders, without a look into them."""
        return list(itertools.islice(dict.fromkeys((self.base, *self.named, *self._folders())), most))

    def entries(self) -> list[Entry]:
        """All of them, the base first."""
        return [entry for name in self.names() if (entry := self.find(name)) is not None]

    def find(self, name: str) -> Entry | None:
        """The model of a name; None: there is none."""
        if name == self.base:
            return Entry(name, None, self._began)
        folder = self.named.get(name)
        if folder is None:
            if self.deltas is None or not _NAME.fullmatch(name):
                return None
            folder = self.deltas / name
        delta = delta_in(folder)
        if delta is None:
            return None
        version = _version(delta)
        return Entry(name, str(delta.absolute()), version // 10**9 or self._began, version)

    def form(self, entry: Entry) -> PromptForm:
        """How a prompt of a user is made into one of the model's. Raises DataError: its files cannot be read."""
        if entry.delta is None:
            return PromptForm.of(self.base_settings)
        known = self._forms.get(entry.delta)
        if known is None or known[0] != entry.version:
            known = self._forms[entry.delta] = (entry.version, PromptForm.of(self.settings_of(Path(entry.delta))))
        return known[1]

    def _folders(self) -> list[str]:
        if self.deltas is not None:
            with contextlib.suppress(OSError), os.scandir(self.deltas) as found:
                return sorted(folder.name for folder in found if _NAME.fullmatch(folder.name) and folder.is_dir())
        return []


def delta_in(folder: Path) -> Path | None:
    """The delta in a folder: that of a run, or the folder itself; None where there is none."""
    places = (folder / "best", folder)
    # not Path.is_file: a client's name may be one that no path has
    return next((place for place in places if any(os.path.isfile(place / file) for file in _FILES)), None)


def _version(folder: Path) -> int:
    """When the last of its files was written, in nanoseconds since 1970; 0 where that is not to be had."""
    with contextlib.suppress(OSError), os.scandir(folder) as files:
        return max((file.stat().st_mtime_ns for file in files), default=0)
    return 0
