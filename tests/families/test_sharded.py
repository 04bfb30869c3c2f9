"""A base that is sharded over two processes is the base that it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.coverage.bases import make
from torch.distributed.fsdp import fully_shard

from spectune.families import describe, differences, fingerprint

BASES = ("llama", "gpt2", "mixtral")


def compare(rank: int, folder: str) -> None:
    """What each process does: FSDP2 over layers and the whole, then a row of this process's own changed."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: list[Any] = []
    for name in BASES:
        base = make(name)
        family = describe(base)
        before, other = fingerprint(base, family), copy.deepcopy(base)
        for layer in family.layers:
            fully_shard(other.get_submodule(layer.path))
        fully_shard(other)
        found.append(differences(before, fingerprint(other, family)))
        if rank == 1:
            with torch.no_grad():
                other.get_submodule(family.linears[2].path).weight.to_local()[0] += 1
        found.append(differences(before, fingerprint(other, family))[0].split(": ")[0])
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_base_over_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(compare, (str(tmp_path),), nprocs=2)
    counts = {name: len(describe(make(name)).linears) for name in BASES}
    for rank in range(2):
        expected = [part for name in BASES for part in ([], f"1 of {counts[name]} linears differ")]
        assert torch.load(tmp_path / f"{rank}.pt") == expected
