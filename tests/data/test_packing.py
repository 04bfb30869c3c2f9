"""Packs: every row once, none too long, little left over; and what a packed batch says of its documents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectune.data import Example, best_fit, collate_packs, pack_step, places

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(SIZES, st.integers(0, 40))
def test_each_document_is_in_one_pack_and_no_pack_is_over_its_length(sizes: list[int], spare: int) -> None:
    capacity = max(sizes) + spare
    packs = best_fit(sizes, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(sizes)))
    used = [sum(sizes[i] for i in pack) for pack in packs]
    assert all(0 < total <= capacity for total in used)
    assert packs == best_fit(tuple(sizes), capacity)
    # a pack is opened only when no other has room, so no two fit into one
    assert sum(sorted(used)[:2]) > capacity or len(packs) == 1


def test_the_longest_goes_first_into_the_fullest_pack_that_has_room() -> None:
    assert best_fit([5, 7, 3, 2, 6], 10) == [[1, 2], [4, 3], [0]]
    # 2 goes beside 7 (room 3), not beside 6 (room 4)
    assert best_fit([7, 6, 2], 10) == [[0, 2], [1]]


def test_nothing_is_cut() -> None:
    with pytest.raises(ValueError, match="11 tokens does not go into a pack of 10"):
        best_fit([3, 11], 10)


@given(SIZES, st.integers(1, 8), st.integers(0, 5), st.booleans(), st.integers(1, 3))
def test_a_step_keeps_its_rows_and_its_batches_their_tokens(
    lengths: list[int], size: int, extra: int, whole: bool, processes: int
) -> None:
    rows = list(range(0, len(lengths), 2))
    found = pack_step(rows, lengths, size, extra=extra, whole=whole, processes=processes)
    assert sorted(row for batch in found for pack in batch for row in pack) == rows
    sizes = [length + extra for length in lengths]
    budget = size * max(sizes[row] for row in rows)
    for batch in found:
        for rank in range(processes):
            share = batch[rank::processes]
            assert not share or places(share, sizes) <= budget
            assert not whole or len(share) <= 1


def test_packs_of_short_rows_leave_little_over() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.normal(3.6, 0.8, (256,), generator=generator).exp().int().clamp(4, 256).tolist()
    steps = [list(range(start, start + 32)) for start in range(0, 256, 32)]
    packed = sum(places(batch, lengths) for rows in steps for batch in pack_step(rows, lengths, 32))
    padded = sum(places([[row] for row in rows], lengths) for rows in steps)
    assert sum(lengths) / packed > 0.95
    assert sum(lengths) / padded < 0.5


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_collate_packs(shapes: list[list[int]], data: st.DataObject) -> None:
    packs = [
        [
            Example(list(range(10 * n + 1, 10 * n + 1 + size)), data.draw(st.integers(0, size)), n)
            for n, size in enumerate(pack)
        ]
        for pack in shapes
    ]
    batch = collate_packs(packs, 0)
    width = max(map(sum, shapes))
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(len(packs), width)}
    for i, pack in enumerate(packs):
        start = 0
        for n, example in enumerate(pack):
            end = start + len(example.input_ids)
            assert batch["input_ids"][i, start:end].tolist() == example.input_ids
            assert batch["position_ids"][i, start:end].tolist() == list(range(end - start))
            assert batch["documents"][i, start:end].tolist() == [n] * (end - start)
            labels = batch["labels"][i, start:end].tolist()
            learned = max(example.prompt_length, 1)
            # nothing predicts a document's first token: what stands before it is another document's last
            assert labels == [-100] * min(learned, end - start) + example.input_ids[learned:]
            start = end
        assert batch["documents"][i, start:].tolist() == [-1] * (width - start)
        assert batch["labels"][i, start:].tolist() == [-100] * (width - start)
        assert not batch["position_ids"][i, start:].any()


@given(SIZES, st.integers(1, 8), st.integers(2, 4))
def test_processes_have_packs_of_like_length(sizes: list[int], rows: int, processes: int) -> None:
    step = pack_step(range(len(sizes)), sizes, rows, whole=True, processes=processes)
    packs = [pack for batch in step for pack in batch]
    assert sorted(index for pack in packs for index in pack) == list(range(len(sizes)))
    used = [sum(sizes[i] for i in pack) for pack in packs]
    assert max(used) <= rows * max(sizes)
    assert max(used) - min(used) <= max(sizes)
    # as many for each, but where there are not so many rows
    assert len(packs) % processes == 0 or len(packs) == len(sizes)
