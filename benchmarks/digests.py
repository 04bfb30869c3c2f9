"""What digests cost: saving and loading a checkpoint-like folder of 1 GB with them and without, in pairs.

    python -m benchmarks.digests --out out/digests.json     # measures; --gb, --pairs, --folder: on the disk in question
    python -m benchmarks.digests --page docs/results/digests.md docs/results/digests.jsonl

A folder of four safetensors files, as full fine-tuning checkpoints them (weights, best weights, optimizer state of
twice their size, random state), is written by `atomic_folder` and `write_tensors` to the last fsync, and read back by
`check_files` and `read_weights` into the tensors that the run has. *Without* is the same code, hashing nothing and
checking nothing; *safetensors* is its own `save_file` in the same `atomic_folder`. Loads are measured from the page
cache, where reading is hardly more than a copy, and again with the files dropped from it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from spectune.files.atomic import atomic_folder, remove_folder
from spectune.files.digests import Digest, check_files
from spectune.files.tensor_file import write_tensors
from spectune.files.weights import read_weights

WAYS = ("with digests", "without", "safetensors")
STEPS = ("save", "load, from the page cache", "load, from the disk")
#: the largest that is wanted of saving and loading together
MOST = 1.25
Tensors = dict[str, dict[str, Tensor]]


def tensors(gigabytes: float) -> Tensors:
    """Of a run that trains its base: matrices of 16 MB, and vectors."""
    side = 2048
    count = max(1, round(gigabytes * 1e9 / 4 / (4 * side * side)))
    generator = torch.Generator().manual_seed(0)

    def part(names: Sequence[str]) -> dict[str, Tensor]:
        found = {name: torch.randn(side, side, generator=generator) for name in names}
        return found | {f"{name}.bias": torch.randn(side, generator=generator) for name in names}

    layers = [f"layers.{layer}.weight" for layer in range(count)]
    return {
        "delta.safetensors": part(layers),
        "best.safetensors": part(layers),
        "optimizer.safetensors": part([f"{name}.{moment}" for name in layers for moment in ("exp_avg", "exp_avg_sq")]),
        "random.safetensors": {"cpu": torch.get_rng_state()},
    }


class _Nothing:
    """In the place of the hash: `write_tensors` as it would be without it."""

    def __init__(self, **_: object) -> None: ...

    def update(self, *_: object) -> None: ...

    def digest(self) -> Digest:
        return Digest(bytes=0, xxh3_128="0" * 32)


@contextlib.contextmanager
def hashing(way: str) -> Iterator[None]:
    if way == "with digests":
        yield
        return
    with mock.patch("spectune.files.tensor_file.Hashing", _Nothing):
        yield


def save(folder: Path, content: Tensors, way: str) -> dict[str, Digest]:
    with atomic_folder(folder) as temporary, hashing(way):
        if way == "safetensors":
            for name, part in content.items():
                save_file(part, temporary / name)
            return {}
        return {name: write_tensors(temporary / name, part, handed_on=False) for name, part in content.items()}


def load(folder: Path, into: Tensors, digests: dict[str, Digest], way: str) -> None:
    if way == "with digests":
        check_files(folder, digests, "")
    for name, part in into.items():
        read = read_weights([folder / name])
        for key, tensor in part.items():
            tensor.copy_(read[key])


def forget(folder: Path) -> None:
    """Drop the files from the page cache; what is written is on the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def once(place: Path, content: Tensors, into: Tensors, way: str) -> dict[str, float]:
    folder = place / "checkpoint-1"
    os.sync()
    saving, digests = timed(lambda: save(folder, content, way))
    warm, _ = timed(lambda: load(folder, into, digests, way))
    forget(folder)
    cold, _ = timed(lambda: load(folder, into, digests, way))
    assert all(torch.equal(into[name][key], content[name][key]) for name in content for key in content[name])
    remove_folder(folder)
    return dict(zip(STEPS, (saving, warm, cold), strict=True))


def measure(place: Path, gigabytes: float, pairs: int) -> dict[str, Any]:
    content = tensors(gigabytes)
    into = {name: {key: torch.empty_like(tensor) for key, tensor in part.items()} for name, part in content.items()}
    once(place, content, into, WAYS[0])  # the first touch of memory and disk is nobody's
    found: list[dict[str, dict[str, float]]] = []
    for number in range(pairs):
        ways = WAYS if number % 2 else WAYS[::-1]
        found.append({way: once(place, content, into, way) for way in ways})
    return {
        "bytes": sum(t.nbytes for part in content.values() for t in part.values()),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": found,
    }


def median(record: dict[str, Any], of: Callable[[dict[str, dict[str, float]]], float]) -> float:
    return statistics.median(of(pair) for pair in record["seconds"])


def ratio(record: dict[str, Any], steps: Sequence[str], base: str = "without") -> float:
    """The median of the pairs' ratios, of the steps together."""
    return median(record, lambda p: sum(p["with digests"][s] for s in steps) / sum(p[base][s] for s in steps))


def page(records: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# What digests cost", "",
        "Saving and loading a checkpoint-like folder with a digest of every file (XXH3, 128 bits) and without: medians "
        "of seconds, and of the ratios within pairs that were measured one after the other. Made by "
        "`python -m benchmarks.digests`, which says how. Of saving and loading together at most "
        f"{MOST} times the time without is wanted.", "",
        "In saving the hash is made beside writing and flushing; in loading from the disk it reads ahead, and what "
        "follows finds the files in memory. A load from the page cache is a copy of memory, and reading the files once "
        "more to hash them is half as much again. With SHA-256, which checkpoints had at first, saving and loading "
        "from the page cache took 2.18 times the time without, on two cores that hash 2 GB a second each.",
    ]  # fmt: skip
    rows = {step: (step,) for step in STEPS} | {f"save and {step}": (STEPS[0], step) for step in STEPS[1:]}
    for record in records:
        lines += [
            "", f"## {record['machine']}", "",
            f"{record['bytes'] / 1e9:.2f} GB in four files, {record['cores']} cores, torch {record['torch']}, "
            f"{len(record['seconds'])} pairs.", "",
            f"| seconds | {' | '.join(WAYS)} | with : without | with : safetensors |", "|---|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for name, steps in rows.items():
            times = [median(record, lambda pair, w=way, of=steps: sum(pair[w][s] for s in of)) for way in WAYS]
            ratios = [ratio(record, steps, base) for base in WAYS[1:]]
            lines.append(f"| {name} | {' | '.join(f'{number:.2f}' for number in times + ratios)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--machine", default=platform.node(), help="what to call it")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is measured")
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--page", type=Path, nargs="+", metavar=("MD", "JSON"), help="make the page of what was found")
    given = parser.parse_args()
    if given.page:
        page_file, *found = given.page
        records = [json.loads(line) for path in found for line in path.read_text().splitlines()]
        page_file.write_text(page(records), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        record = {"machine": given.machine, **measure(Path(place), given.gb, given.pairs)}
    print(page([record]))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
