"""The names that a request may give as `model`: the base's, and those of deltas."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectune.data.asking import PromptForm
from spectune.errors import ConfigError

#: a delta's folder has one of them
_FILES = ("spectune.json", "adapter_config.json")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")


@dataclass(frozen=True)
class Entry:
    """A model that is served.

    Attributes:
        delta: its folder, which is its name in the bank; None of the base.
        created: seconds since 1970.
    """

    name: str
    delta: str | None
    created: int


@dataclass
class Catalogue:
    """What is served under which name.

    A folder that comes into `deltas` while the server runs is served from then on. Names are looked up among the
    folders that are there: what a client writes is never made into a path.

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
    _forms: dict[str, tuple[float, PromptForm]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name in self.named:
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{name!r} cannot be a model's name; expected letters, digits, '-', '_' and '.'")
        if taken := [name for name in (*self.named, *self._folders()) if name == self.base]:
            raise ConfigError(f"a delta and the base are both called {taken[0]!r}; rename the delta's folder")

    @property
    def has_deltas(self) -> bool:
        """Whether deltas are served beside the base, or may come to be."""
        return bool(self.named) or self.deltas is not None

    def entries(self) -> list[Entry]:
        """All of them, the base first."""
        names = dict.fromkeys((*self.named, *self._folders()))
        found = (self.find(name) for name in names)
        return [Entry(self.base, None, self._began), *(entry for entry in found if entry is not None)]

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
        return Entry(name, str(delta.absolute()), int(_changed(delta)) or self._began)

    def form(self, entry: Entry) -> PromptForm:
        """How a prompt of a user is made into one of the model's. Raises DataError: its files cannot be read."""
        if entry.delta is None:
            return PromptForm.of(self.base_settings)
        changed = _changed(Path(entry.delta))
        known = self._forms.get(entry.delta)
        if known is None or known[0] != changed:
            known = self._forms[entry.delta] = (changed, PromptForm.of(self.settings_of(Path(entry.delta))))
        return known[1]

    def _folders(self) -> Iterator[str]:
        if self.deltas is not None and self.deltas.is_dir():
            folders = sorted(path for path in self.deltas.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
            yield from (path.name for path in folders)


def delta_in(folder: Path) -> Path | None:
    """The delta in a folder: that of a run, or the folder itself; None where there is none."""
    places = (folder / "best", folder)
    return next((place for place in places if any((place / file).is_file() for file in _FILES)), None)


def _changed(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
