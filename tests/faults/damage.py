"""Damaged and hostile input: what each case is, how it is run, and what is held against it.

A kind makes its cases from seeds: the same seed is the same case. A case's folder is a copy of an undamaged one, in
which one thing is changed; its command runs in a limited process that is watched. The same command on the undamaged
folder says what comes out of it otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.child import Case, Outcome
from tests.faults.kinds import Kind, Place, Verdict
from tests.faults.scenes import copied

#: what the README says that a command may end with, an interruption apart
CODES = range(7)
OUT_OF_MEMORY = 5
MOST_MEMORY = 2 * 2**30
#: characters of a message: fifty bad rows are listed, and the others counted
LONGEST = 20_000
#: what a result has of clocks, machines and places; of bytes on disk a config's text is a part
VOLATILE = re.compile(
    r"sha256|stored_bytes|second|memory|load_average|ran_share|overhead|latency|spread|environment|decode|rounds|cost"
)
#: files that are results: weights; of `report` what it writes, which elsewhere has new times, where work is done again
WEIGHTS, PAGES = {".safetensors"}, {".csv", ".md", ".html"}
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Trial:
    """One case.

    Attributes:
        scene: the undamaged folder. argv, call, given: what runs on the copy; see `child.Case`.
        touched: what was damaged, relative to the folder; "" where nothing of the scene was.
        what: how, in words.
        names: what a message may call it; one of them has to be there.
        compared: whether the undamaged result is what an undisturbed one would be; not where other data are given.
        hub: whether the folder names a base on the hub where it may.
        knowable: whether anything in the folder says what was there before: a bare base has no record of itself.
    """

    scene: Path
    argv: tuple[str, ...]
    touched: str
    what: str
    call: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    compared: bool = True
    knowable: bool = True
    hub: bool = False

    @property
    def command(self) -> str:
        return " ".join(self.argv) if self.call is None else self.call


@dataclass(frozen=True)
class Truth:
    """What the command says and writes of the undamaged folder."""

    rc: int
    stderr: str
    values: Mapping[str, Any]
    files: Mapping[str, str]

    def where_alike(self, other: Truth) -> Truth:
        """Without what another run of the same has otherwise: clocks that `VOLATILE` does not know."""
        values = {k: v for k, v in self.values.items() if repr(other.values.get(k)) == repr(v)}
        files = {k: v for k, v in self.files.items() if other.files.get(k) == v}
        return replace(self, values=values, files=files)


@dataclass(frozen=True)
class Judgement:
    """A case's end.

    Attributes:
        faults: what was broken, by name.
        heard: refused, warned, same, unknowable, silent or killed; "ran" where nothing is compared.
        cause: where a fault comes from, for grouping. differs: the first thing that is other than it would be.
    """

    trial: Trial
    outcome: Outcome
    faults: tuple[str, ...]
    heard: str
    cause: str
    differs: str = ""

    def __str__(self) -> str:
        end = "hung" if self.outcome.hung else f"exit {self.outcome.rc}"
        return (
            f"{self.trial.touched}: {self.trial.what}: spectune {self.trial.command}: {self.cause} {self.differs}\n"
            f"    {end} after {self.outcome.seconds:.1f} s: {self.outcome.stderr.strip()[-700:]}"
        )

    def verdict(self) -> Verdict:
        """As the table of all kinds takes it."""
        flips = {f"flipped bits: {self.heard}": 1} if "flipped" in self.trial.what else {}
        return Verdict(str(self), list(self.faults), {self.heard: 1, **flips})


Make = Callable[[Place, Random, Path], Trial]


def judgement(place: Place, make: Make, random: Random) -> Judgement:
    """Make a case, run it, and judge it."""
    folder = place.folder / "case"
    trial = make(place, random, folder)
    before = files_of(folder)
    outcome, seen = watched(place, trial, folder)
    result, truth = result_of(folder, before, outcome), None
    if trial.compared and outcome.rc == 0:
        truth = truth_of(place, trial)
        if difference(trial, truth, result):
            truth = truth.where_alike(truth_of(place, trial, "again"))
    return judged(trial, truth, outcome, [*seen, *marks(folder)], result)


def kind(name: str, promise: str, cases: int, make: Make, *, quick: int = 20, fast: int = 0) -> Kind:
    """A kind for the table."""

    def case(place: Place, seed: int, index: int) -> Verdict:
        return judgement(place, make, Random(f"{name} {seed} {index}")).verdict()

    return Kind(name, promise, cases, case, quick, fast)


def watched(place: Place, trial: Trial, folder: Path) -> tuple[Outcome, list[str]]:
    """Run what a trial runs, in a folder. Returns what was seen of it that is not allowed, too."""
    log = folder.with_name(f"{folder.name}.log")
    watch = ("tests.faults.watching:watch", {"root": str(folder), "log": str(log)})
    outcome = place.forks.run(Case(trial.argv, cwd=folder, call=trial.call, given=trial.given, faults=(watch,)))
    seen = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return outcome, seen


def truth_of(place: Place, trial: Trial, time: str = "first") -> Truth:
    """What comes of the undamaged folder; made once for all cases that run the same there."""
    key = json.dumps([trial.scene.name, trial.argv, trial.call, dict(trial.given)], sort_keys=True)
    name = f"truth-{hashlib.sha256(key.encode()).hexdigest()[:20]}-{time}"

    def make(folder: Path) -> None:
        (folder / "truth.json").write_text(json.dumps(asdict(_undamaged(place, trial, folder / "case"))))

    return Truth(**json.loads((place.once(name, make) / "truth.json").read_text()))


def _undamaged(place: Place, trial: Trial, folder: Path) -> Truth:
    copied(trial.scene, folder)
    before = files_of(folder)
    outcome, seen = watched(place, trial, folder)
    assert outcome.rc == 0, f"the undamaged {trial.scene.name}: {trial.command}: {outcome}"
    assert not seen, f"the undamaged {trial.scene.name}: {trial.command}: {seen}"
    values, files = result_of(folder, before, outcome)
    shutil.rmtree(folder)
    return Truth(outcome.rc, outcome.stderr, values, files)


def marks(folder: Path) -> list[str]:
    """What code of the case left behind."""
    return ["code: its marker is there"] if (folder / "marker").exists() else []


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Regular files, and what tells whether they were written since."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            state = os.lstat(os.path.join(place, name))
            if stat.S_ISREG(state.st_mode):
                found[os.path.relpath(os.path.join(place, name), folder)] = (state.st_ino, state.st_mtime_ns)
    return found


def result_of(
    folder: Path, before: Mapping[str, tuple[int, int]], outcome: Outcome
) -> tuple[dict[str, Any], dict[str, str]]:
    """What a command printed, leaf by leaf, and the digests of the files that it wrote."""
    try:
        printed = json.loads(outcome.stdout) if outcome.value is None else outcome.value
    except ValueError:
        printed = {"text": outcome.stdout}
    files = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name, state in files_of(folder).items()
        if before.get(name) != state and Path(name).suffix in WEIGHTS | PAGES and not name.startswith("tmp")
    }
    return leaves(printed), files


def leaves(content: Any, at: str = "") -> dict[str, Any]:
    if VOLATILE.search(at.rpartition(".")[2]):
        return {}
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else None
    if inner is None:
        return {at: content}
    found = {f"{at}#": len(content)} if isinstance(content, list) else {}
    for key, value in inner:
        found |= leaves(value, f"{at}.{key}")
    return found


# -- judgement -------------------------------------------------------------------------------------------------------


def judged(
    trial: Trial, truth: Truth | None, outcome: Outcome, seen: list[str], result: tuple[dict[str, Any], dict[str, str]]
) -> Judgement:
    faults = broken(trial, outcome, seen)
    differs = "" if truth is None else difference(trial, truth, result)
    heard = "killed" if outcome.killed else "refused"
    if outcome.rc == 0:
        heard = "ran" if truth is None else "same"
        if truth is not None and warned(trial, truth, outcome):
            heard = "warned"
        elif differs:
            heard = "silent" if trial.knowable else "unknowable"
        if heard == "silent":
            faults.append("silent change")
    return Judgement(trial, outcome, tuple(faults), heard, cause_of(faults, outcome, seen), differs)


def broken(trial: Trial, outcome: Outcome, seen: list[str]) -> list[str]:
    """The laws that hold for whatever is given."""
    found = []
    if outcome.hung:
        found.append("hang")
    elif outcome.killed:
        found.append(f"killed by signal {-outcome.rc}")
    if outcome.traceback:
        found.append("traceback")
    if outcome.memory > MOST_MEMORY or outcome.rc == OUT_OF_MEMORY:
        found.append("memory")
    if outcome.left_over:
        found.append("processes left")
    if not outcome.killed and outcome.rc not in CODES:
        found.append(f"exit code {outcome.rc}")
    known = {"network"} if trial.hub else set()
    found += sorted({line.strip("'\"").partition(":")[0] for line in seen} - known)
    if "[y/N]" in outcome.stderr + outcome.stdout:
        found.append("a question on stdin")
    if CONTROL.search(outcome.stderr) or CONTROL.search(outcome.stdout):
        found.append("control characters")
    if outcome.rc > 0 and not outcome.traceback:
        found += wrong_message(trial, outcome)
    return found


def wrong_message(trial: Trial, outcome: Outcome) -> list[str]:
    """What is wrong with what a refusal says."""
    start = re.search(r"(error|stopped): |^Usage:", outcome.stderr, re.MULTILINE)
    if start is None:
        return ["no message"]
    said = outcome.stderr[start.start() :]
    found = []
    if len(re.findall(r"^(?:error|stopped): ", said, re.MULTILINE)) > 1:
        found.append("several messages")
    if len(said) > LONGEST:
        found.append("long message")
    if not any(name in said for name in (*trial.names, "this base has")):
        found.append("not named")
    return found


def warned(trial: Trial, truth: Truth, outcome: Outcome) -> bool:
    """Whether a line that is not there otherwise names what was damaged."""
    known = set(truth.stderr.splitlines())
    name = Path(trial.touched).name
    return any(name in line for line in outcome.stderr.splitlines() if line not in known)


def difference(trial: Trial, truth: Truth, result: tuple[dict[str, Any], dict[str, str]]) -> str:
    """The first of what is other than it would be; empty where nothing is."""
    suffixes = WEIGHTS | (PAGES if "report" in trial.argv else set())
    files = {name: digest for name, digest in truth.files.items() if Path(name).suffix in suffixes}
    for wanted, found in zip((truth.values, files), result, strict=True):
        for name, value in wanted.items():
            if name not in found or repr(found[name]) != repr(value):
                return f"[{name}: {str(value)[:60]!r} -> {str(found.get(name))[:60]!r}]"
    return ""


def cause_of(faults: list[str], outcome: Outcome, seen: list[str]) -> str:
    """Where a fault comes from: an error's type and our innermost line, or the first thing seen."""
    if outcome.traceback:
        ours = re.findall(r'src/spectune/(\S+?)", line (\d+), in (\S+)', outcome.stderr)
        lines = [
            line for line in outcome.stderr.splitlines() if re.match(r"^[\w.]*(Error|Exception|Exit|Panic\w*)\b", line)
        ]
        where = ":".join(ours[-1]) if ours else "?"
        return f"{(lines or ['?'])[-1][:100]} at {where}"
    return seen[0][:160] if seen and any(f in ("network", "program", "code", "written") for f in faults) else ""
