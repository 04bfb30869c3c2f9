"""Disks that are full, out of inodes, read-only or broken: one sentence that names the folder, nothing half-written
under a name that counts, and once there is room the work goes on to the same end."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.faults.child import Case, Outcome
from tests.faults.crashes import point
from tests.faults.kinds import Kind, Place, Verdict
from tests.faults.material import (
    OUT,
    TRAIN,
    case,
    command,
    differences,
    either,
    finished,
    resumed,
    trained,
    tree,
    unbroken,
)

CODES = ("ENOSPC", "EDQUOT", "EIO", "EROFS")
PAGE = 4096
#: commands that write what a finished run or comparison gives: the scenario that they are of, their words, their target
DERIVED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "merge": ("lora", ("merge", "--run", OUT, "--output-dir", "made"), "made"),
    "export": ("lora", ("export", "--run", OUT, "--format", "peft", "--output-dir", "made"), "made"),
    "report": ("given", ("report", OUT), OUT),
}


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount a small disk in memory."""
    import tempfile

    folder = tempfile.mkdtemp(prefix="spectune-mount-")
    try:
        done = (
            _mount("tmpfs", folder, "size=64k")
            and subprocess.run(["umount", folder], capture_output=True).returncode == 0
        )
    except OSError:
        done = False
    os.rmdir(folder)
    return done


def _mount(kind: str, folder: str, options: str) -> bool:
    return subprocess.run(["mount", "-t", kind, "-o", options, kind, folder], capture_output=True).returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    if not _mount("tmpfs", str(folder), options):
        raise RuntimeError(f"cannot mount a disk with {options}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def enlarge(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=256m,nr_inodes=0", str(folder)], check=True)


def needs(folder: Path) -> tuple[int, int]:
    """Pages and inodes that a tree takes."""
    names = tree(folder)
    files = [folder / name for name, kind in names.items() if kind == "file"]
    return sum(-(-file.stat().st_size // PAGE) for file in files) + 2, len(names) + 2


def said(outcome: Outcome, folder: str) -> list[str]:
    """What is wrong with how a failed write is said."""
    problems = []
    if outcome.rc != 1 or outcome.traceback or outcome.hung:
        problems.append(f"expected exit 1 and one sentence: {outcome}")
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error:")]
    if outcome.rc == 1 and not any(folder in line for line in errors):
        problems.append(f"no error that names {folder}: {outcome}")
    return problems


def whole(outcome: Outcome, folder: Path) -> list[str]:
    """A message of a run that has checkpoints says where to go on from."""
    checkpoints = [path.name for path in folder.glob("checkpoint-*")]
    if outcome.rc != 1 or not checkpoints or any(name in outcome.stderr for name in checkpoints):
        return []
    return [f"does not say that {' and '.join(sorted(checkpoints))} can be gone on from: {outcome.stderr[-300:]}"]


def _full(place: Place, name: str, options: str, what: str) -> Verdict:
    """A disk that has no room for all, and later has."""
    unbroken(place, name)
    with small_disk(place.folder / "disk", options) as disk:
        inside = replace(place, folder=disk)
        outcome = place.forks.run(case(inside, name))
        problems = [] if outcome.rc == 0 else said(outcome, OUT)
        if name in TRAIN:
            problems += whole(outcome, disk / OUT)
        enlarge(disk)
        problems += resumed(inside, name)[1]
        return Verdict(what, problems, {"ran out": int(outcome.rc != 0)})


def _full_disk(place: Place, seed: int, index: int) -> Verdict:
    rng = FULL.random(seed, index)
    name, inodes = rng.choice([*trained(place), *either(place)]), rng.random() < 0.25
    pages, entries = needs(unbroken(place, name) / OUT)
    if not can_mount():
        return _failing(place, rng, name, rng.randrange(100), "ENOSPC")
    if inodes:
        allowed = rng.randrange(3, entries)
        return _full(place, name, f"size=64m,nr_inodes={allowed}", f"{name} on a disk of {allowed} of {entries} inodes")
    allowed = rng.randrange(1, pages)
    return _full(place, name, f"size={allowed * PAGE}", f"{name} on a disk of {allowed} of {pages} pages")


FULL = Kind(
    "full-disk",
    "`train` and `compare` on a disk without room or inodes for all: exit 1, one sentence that names the folder and "
    "the last checkpoint; with more room, `--resume` ends bit-equal",
    100, _full_disk, quick=6, fast=1,
)  # fmt: skip


def _failing(place: Place, rng: random.Random, name: str, at: int, code: str) -> Verdict:
    lasting = rng.random() < 0.7
    fault = {"root": str(place.folder / OUT), "at": at, "code": code, "lasting": lasting}
    outcome = place.forks.run(case(place, name, faults=[("tests.faults.injection:fail", fault)]))
    problems = [] if outcome.rc == 0 else said(outcome, OUT)
    if name in TRAIN:
        problems += whole(outcome, place.folder / OUT)
    what = f"{name}, {code} at call {at}" + (" and all behind it" if lasting else "")
    return Verdict(what, problems + resumed(place, name)[1], {"failed": int(outcome.rc != 0)})


def _failing_disk(place: Place, seed: int, index: int) -> Verdict:
    rng = FAILING.random(seed, index)
    name, at = point(place, either(place), (index % FAILING.cases + rng.random()) / FAILING.cases)
    return _failing(place, rng, name, at, rng.choice(CODES))


FAILING = Kind(
    "failing-disk",
    "no space, a quota, a read-only or a broken disk at any call that writes: as on a full disk",
    100, _failing_disk, quick=6, fast=0,
)  # fmt: skip


def derived(place: Place, name: str) -> Case:
    scenario, words, _ = DERIVED[name]
    words = (
        words if name == "report" else (*words, "--data", _value(command(place, scenario), "--data"), "--device", "cpu")
    )
    return Case(words, cwd=place.folder, limit_s=60.0)


def _value(words: tuple[str, ...], flag: str) -> str:
    return words[words.index(flag) + 1]


def made(place: Place, name: str) -> Path:
    """What merge, export or report makes where nothing happens to it."""

    def make(folder: Path) -> None:
        inside = replace(place, folder=folder)
        finished(inside, DERIVED[name][0])
        done = place.forks.run(derived(inside, name))
        assert done.rc == 0, done

    return place.once(f"made-{name}", make)


def _full_derived(place: Place, seed: int, index: int) -> Verdict:
    rng = DERIVED_FULL.random(seed, index)
    name = "merge" if place.few else rng.choice([*DERIVED])
    expected = made(place, name)
    scenario, _, target = DERIVED[name]
    before, after = needs(unbroken(place, scenario) / OUT)[0], needs(expected)[0]
    room = rng.randrange(1, max(2, after - before)) if name != "report" else rng.randrange(1, 12)
    if not can_mount():
        fault = {"root": str(place.folder / target), "at": rng.randrange(30), "code": "ENOSPC"}
        finished(place, scenario)
        outcome = place.forks.run(replace(derived(place, name), faults=(("tests.faults.injection:fail", fault),)))
        return Verdict(f"{name}, ENOSPC", said(outcome, target) if outcome.rc else [])
    with small_disk(place.folder / "disk", "size=64m") as disk:
        inside = replace(place, folder=disk)
        finished(inside, scenario)
        names = tree(disk)
        subprocess.run(["mount", "-o", f"remount,size={(_used(disk) + room) * PAGE}", str(disk)], check=True)
        outcome = place.forks.run(derived(inside, name))
        problems = [] if outcome.rc == 0 else said(outcome, target)
        if outcome.rc != 0 and (left := [name for name in tree(disk) if name not in names]):
            problems.append(f"left behind: {left}")
        enlarge(disk)
        again = place.forks.run(derived(inside, name))
        if outcome.rc != 0:
            problems += [] if again.rc == 0 else [f"with room: {again}"]
        problems += differences(expected, disk)
        return Verdict(f"{name} with {room} pages of room", problems, {"ran out": int(outcome.rc != 0)})


def _used(disk: Path) -> int:
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize // PAGE


DERIVED_FULL = Kind(
    "full-disk-made",
    "`merge`, `export` and `report` on a full disk: exit 1, one sentence that names the folder, nothing left behind; "
    "with more room the same command ends as it should",
    60, _full_derived, quick=4, fast=1,
)  # fmt: skip

KINDS = (FULL, FAILING, DERIVED_FULL)
