"""Faults by accident: a few cases of each kind by a seed of the day in `make test`, all in `make test-slow`."""

from __future__ import annotations

import datetime
import os
import shutil
from pathlib import Path

import pytest

from tests.faults import batches, crashes, disks, pairs, served, signals, streams
from tests.faults.child import Case, Forks
from tests.faults.kinds import Kind, judged
from tests.faults.material import differences

KINDS: list[Kind] = [
    kind for module in (crashes, disks, signals, streams, pairs, batches, served) for kind in module.KINDS
]
#: cases of a slow test: one that fails says which of so many it was
CHUNK = 25
#: other cases every day, and the same ones again with SPECTUNE_FAULTS_SEED
SEED = int(os.environ.get("SPECTUNE_FAULTS_SEED") or datetime.date.today().toordinal())


def run(kind: Kind, forks: Forks, root: Path, indices: list[int], *, few: bool = False) -> None:
    print(f"SPECTUNE_FAULTS_SEED={SEED}, {kind.name}, cases {', '.join(map(str, indices[:20]))}")
    failed = []
    for index in indices:
        verdict, _ = judged(kind, forks, root, SEED, index, few=few)
        failed += [f"case {index}, {verdict.what}: {problem}" for problem in verdict.problems]
    assert not failed, f"{kind.promise}\n" + "\n".join(failed[:40])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.fast], ids=lambda kind: kind.name)
def test_what_is_promised_under_a_kind_of_fault_holds_in_a_few_cases(
    kind: Kind, forks: Forks, shared_root: Path
) -> None:
    indices = kind.random(SEED, -1).sample(range(kind.cases), kind.fast)
    run(kind, forks, shared_root, indices, few=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "start"),
    [pytest.param(kind, start, id=f"{kind.name}-{start}") for kind in KINDS for start in range(0, kind.cases, CHUNK)],
)
def test_what_is_promised_under_a_kind_of_fault_holds_in_all_cases(
    kind: Kind, start: int, forks: Forks, shared_root: Path
) -> None:
    run(kind, forks, shared_root, [*range(start, min(start + CHUNK, kind.cases))])


def test_a_child_says_how_it_ended(forks: Forks, tmp_path: Path) -> None:
    def case(code: str, **how: float) -> Case:
        return Case(call="builtins:exec", given={"source": code}, cwd=tmp_path, **how)  # type: ignore[arg-type]

    assert forks.run(Case(("--version",), cwd=tmp_path)).stdout.startswith("spectune ")
    assert forks.run(case("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")).rc == -9
    assert forks.run(case("raise ValueError")).traceback
    assert forks.run(case("bytearray(3 * 2**30)")).rc == 1
    assert 40 * 2**20 < forks.run(case("bytes(range(256)) * 2**18")).memory < 2**30
    hung = forks.run(case("while True: pass", limit_s=0.2))
    assert hung.hung
    assert hung.seconds < 10


def test_what_is_not_the_same_in_two_folders_is_found(tmp_path: Path) -> None:
    one = tmp_path / "one"
    (one / "best-2").mkdir(parents=True)
    (one / "best").symlink_to("best-2")
    (one / "best-2" / "model.safetensors").write_bytes(bytes(64))
    (one / "result.json").write_text('{"loss": 1.0, "train_seconds": 2.0}')
    other = Path(shutil.copytree(one, tmp_path / "other", symlinks=True))
    (other / "result.json").write_text('{"loss": 1.0, "train_seconds": 3.0}')
    assert differences(one, other) == []
    (other / "result.json").write_text('{"loss": 1.5, "train_seconds": 3.0}')
    (other / "best-2" / "model.safetensors").write_bytes(bytes(63) + b"\1")
    (other / ".result.json.x").touch()
    (other / "best").unlink()
    (other / "best").symlink_to("best-1")
    assert differences(one, other) == [
        "left over: .result.json.x",
        "best is a link to best-1, where there is nothing, expected a link to best-2",
        "best-2/model.safetensors: other bytes",
        "result.json: .loss is 1.5, expected 1.0",
    ]
