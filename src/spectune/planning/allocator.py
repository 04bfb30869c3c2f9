"""torch's caching allocator for CUDA, played: what a sequence of tensors made and freed comes to on the device.

Source: c10/cuda/CUDACachingAllocator.cpp with its default settings. Sizes are rounded up to 512 bytes; blocks up to
1 MiB are cut from segments of 2 MiB, others below 10 MiB from segments of 20 MiB, larger ones have segments of their
own in steps of 2 MiB. A block is given whole where no more than 1 MiB would be left over, and counts whole.

With `expandable_segments` there is one segment for small and one for large tensors, which grows at its end by 2 and by
20 MiB, and every block is cut to size.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

MIB = 2**20
ROUND = 512
SMALL = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB
OWN_STEP = 2 * MIB


@dataclass(eq=False, slots=True)
class Block:
    """A part of a segment, neighbours linked."""

    place: int
    size: int
    pool: list[tuple[int, int]]
    before: Block | None = None
    after: Block | None = None
    free: bool = False


class CachingAllocator:
    """`allocated` and `reserved` are bytes now, `peak_allocated` since the last `reset`; reserved never falls."""

    def __init__(self, *, expandable: bool = False) -> None:
        self.expandable = expandable
        self.allocated = self.reserved = self.peak_allocated = 0
        self._pools: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        self._free: dict[int, Block] = {}
        self._end = 0
        #: of an expandable segment the last block, small and large
        self._last: list[Block | None] = [None, None]

    def reset(self) -> None:
        """Start the peak anew, from what is allocated now."""
        self.peak_allocated = self.allocated

    def take(self, size: int) -> Block:
        """Memory for a tensor of `size` bytes."""
        size = max(ROUND, -(-size // ROUND) * ROUND)
        small = size <= SMALL
        pool = self._pools[0 if small else 1]
        at = bisect_left(pool, (size, -1))
        # the block at the end of an expandable segment counts as large as that may grow: any other that fits is better
        if self.expandable and at + 1 < len(pool) and self._free[pool[at][1]] is self._last[not small]:
            at += 1
        if at < len(pool):
            block = self._free.pop(pool.pop(at)[1])
            block.free = False
        elif self.expandable:
            block = self._grown(size, 0 if small else 1)
        else:
            segment = (
                SMALL_SEGMENT if small else LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // OWN_STEP) * OWN_STEP
            )
            block = Block(self._end, segment, pool)
            self._end += segment + ROUND  # never merged with the next segment
            self.reserved += segment
        left = block.size - size
        if left >= ROUND if small or self.expandable else left > SMALL:
            rest = Block(block.place + size, left, pool)
            rest.before, rest.after = block, block.after
            if rest.after is not None:
                rest.after.before = rest
            if self._last[not small] is block:
                self._last[not small] = rest
            block.after, block.size = rest, size
            self._put(rest)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def _grown(self, size: int, kind: int) -> Block:
        """A block of at least `size` at the end of an expandable segment (0: of small tensors, 1: of large ones), whose
        last block, if it is free, is part of it."""
        last, step = self._last[kind], LARGE_SEGMENT if kind else SMALL_SEGMENT
        reused = last is not None and last.free
        more = -(-(size - (last.size if last is not None and reused else 0)) // step) * step
        self.reserved += more
        if last is not None and reused:
            last.pool.pop(bisect_left(last.pool, (last.size, last.place)))
            del self._free[last.place]
            last.free, last.size = False, last.size + more
            return last
        # places are apart by kind, so that no end ever meets another segment
        place = (kind + 1) * 2**60 if last is None else last.place + last.size
        block = Block(place, more, self._pools[kind], before=last)
        if last is not None:
            last.after = block
        self._last[kind] = block
        return block

    def give(self, block: Block) -> None:
        """The tensor is gone."""
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._merge(block, other)
        self._put(block)

    def _merge(self, block: Block, other: Block) -> None:
        other.pool.pop(bisect_left(other.pool, (other.size, other.place)))
        del self._free[other.place]
        if other is block.before:
            block.place, block.before = other.place, other.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = other.after
            if block.after is not None:
                block.after.before = block
        for kind, last in enumerate(self._last):
            if last is other:
                self._last[kind] = block
        block.size += other.size

    def _put(self, block: Block) -> None:
        block.free = True
        self._free[block.place] = block
        insort(block.pool, (block.size, block.place))
