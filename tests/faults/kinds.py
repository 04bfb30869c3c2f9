"""Kinds of faults: what is promised of each, and one case of it by its number. Tests and `benchmarks.reliability` run
them alike; a module that has some lists them in `KINDS`, and its name stands in `MODULES`."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.util
import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.child import Forks

MODULES = ("crashes", "disks", "signals", "streams", "pairs", "batches", "served", "spoiled_bases", "spoiled_deltas",
           "spoiled_runs", "hostile_rows", "hostile_chats")  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a case runs.

    Attributes:
        folder: its own, empty; gone after it.
        shared: for what all cases use: see `once`.
        few: of the scenarios the quickest are enough.
    """

    forks: Forks
    folder: Path
    shared: Path
    few: bool = False

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """`shared/<name>`, filled by `make` by the first process that asks; the others wait for it."""
        folder, done = self.shared / name, self.shared / f"{name}.made"
        if done.exists():
            return folder
        with open(self.shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                make(folder)
                done.touch()
        return folder


@dataclass(frozen=True)
class Verdict:
    """Whether a case held.

    Attributes:
        what: what was done to what, for the list of failures.
        problems: what was promised and is not so; none where it held.
        counts: what is counted over all cases of a kind, such as bytes changed that were noticed.
    """

    what: str
    problems: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        return not self.problems


Function = Callable[[Place, int, int], Verdict]


@dataclass(frozen=True)
class Kind:
    """Attributes:
    name: as `--only` takes it.
    promise: one sentence, for the table.
    cases, quick, fast: how many there are in the whole run, with `--quick`, and in `make test`.
    case: one of them, by the run's seed and its own number.
    """

    name: str
    promise: str
    cases: int
    case: Function
    quick: int = 4
    fast: int = 1

    def random(self, seed: int, index: int) -> random.Random:
        """The same for the same case, whichever cases ran before it."""
        return random.Random(f"{self.name} {seed} {index}")


def kinds() -> list[Kind]:
    """All there are."""
    found = [name for name in MODULES if importlib.util.find_spec(f"tests.faults.{name}")]
    return [kind for name in found for kind in importlib.import_module(f"tests.faults.{name}").KINDS]


@contextlib.contextmanager
def case_folder(root: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def judged(kind: Kind, forks: Forks, root: Path, seed: int, index: int, *, few: bool = False) -> tuple[Verdict, float]:
    """One case, in a folder of its own; an error of the harness itself is a failure, too. And its seconds."""
    begin = time.monotonic()
    shared = root / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    with case_folder(root) as folder:
        try:
            verdict = kind.case(Place(forks, folder, shared, few), seed, index)
        except Exception:
            verdict = Verdict("the harness itself", [traceback.format_exc()[-1500:]])
    return verdict, time.monotonic() - begin
