"""torch's rules for segments and blocks, on cases that are worked out by hand."""

from __future__ import annotations

from spectune.planning.allocator import MIB, CachingAllocator


def test_sizes_are_rounded_to_512_bytes_and_small_blocks_share_a_segment() -> None:
    allocator = CachingAllocator()
    allocator.take(1)
    allocator.take(513)
    assert allocator.allocated == 512 + 1024
    assert allocator.reserved == 2 * MIB


def test_small_and_large_do_not_mix_and_large_ones_share_twenty_mebibytes() -> None:
    allocator = CachingAllocator()
    allocator.take(MIB)  # still small
    allocator.take(MIB + 1)
    assert allocator.reserved == (2 + 20) * MIB
    allocator.take(9 * MIB)
    assert allocator.reserved == 22 * MIB


def test_a_block_with_little_left_over_is_given_whole() -> None:
    allocator = CachingAllocator()
    allocator.take(11 * MIB + MIB // 2)  # a segment of 12 MiB: half a MiB is no block of its own
    assert allocator.allocated == allocator.reserved == 12 * MIB
    allocator.take(10 * MIB)
    assert allocator.allocated == allocator.reserved == 22 * MIB


def test_what_is_freed_is_used_again_and_neighbours_merge() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.take(size * MIB) for size in (6, 6, 8)]
    assert allocator.reserved == 20 * MIB
    for block in blocks:
        allocator.give(block)
    assert allocator.allocated == 0
    assert allocator.peak_allocated == 20 * MIB
    allocator.take(19 * MIB)
    assert allocator.reserved == 20 * MIB


def test_a_hole_that_is_too_small_is_left() -> None:
    allocator = CachingAllocator()
    first = allocator.take(30 * MIB)
    allocator.take(2 * MIB)
    allocator.give(first)
    allocator.take(40 * MIB)
    assert allocator.reserved == (30 + 20 + 40) * MIB
    allocator.take(29 * MIB)  # into the hole, whole
    assert allocator.reserved == 90 * MIB
    assert allocator.allocated == (2 + 40 + 30) * MIB


def test_the_smallest_hole_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    large, small = allocator.take(60 * MIB), allocator.take(14 * MIB)
    allocator.give(large)
    allocator.give(small)
    allocator.take(13 * MIB)
    allocator.take(60 * MIB)
    assert allocator.reserved == 74 * MIB


def test_expandable_segments_grow_at_their_end_and_cut_every_block_to_size() -> None:
    allocator = CachingAllocator(expandable=True)
    first = allocator.take(30 * MIB)
    assert (allocator.allocated, allocator.reserved) == (30 * MIB, 40 * MIB)
    second = allocator.take(9 * MIB)
    assert (allocator.allocated, allocator.reserved) == (39 * MIB, 40 * MIB)
    allocator.give(first)
    # the hole is too small, and the last block is too: only what is missing is added to it
    third = allocator.take(35 * MIB)
    assert allocator.reserved == 80 * MIB
    for block in (second, third):
        allocator.give(block)
    whole = allocator.take(79 * MIB)
    assert (allocator.allocated, allocator.reserved) == (79 * MIB, 80 * MIB)
    allocator.give(whole)
    assert allocator.allocated == 0
    small = allocator.take(1000)
    assert (small.size, allocator.reserved) == (1024, 82 * MIB)


def test_batches_of_unlike_sizes_leave_holes_in_segments_of_fixed_size_alone() -> None:
    found = {}
    for expandable in (False, True):
        allocator = CachingAllocator(expandable=expandable)
        for size in (20, 23, 26, 29, 33):
            blocks = [allocator.take(size * MIB) for _ in range(10)]
            for block in blocks:
                allocator.give(block)
        found[expandable] = allocator.reserved / allocator.peak_allocated
    assert found[True] < 1.1 < 2 < found[False]
