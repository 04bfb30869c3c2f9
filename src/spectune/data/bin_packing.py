"""Which rows share a sequence: best-fit-decreasing packing of the rows of one optimizer step.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830: each document goes, the longest
first, into the fullest sequence that still has room for it. Nothing is cut. A step keeps its rows: its gradient is a
sum over them, in whatever sequences they stand.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

#: lengths tried for a pack, as multiples of the longest row: longer packs leave less over and cost more attention
_STRETCHES = (1.0, 1.25, 1.5, 2.0)


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the documents of each pack, each index once, no pack over `capacity`.

    Args:
        sizes: tokens of each document.

    Raises:
        ValueError: a document is longer than a pack.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # free places and number of each pack, the fullest first
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[index]
        if size > capacity:
            raise ValueError(f"a document of {size} tokens does not go into a pack of {capacity}; nothing is cut")
        at = bisect_left(rooms, (size, -1))
        room, number = rooms.pop(at) if at < len(rooms) else (capacity, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(index)
        insort(rooms, (room - size, number))
    return packs


def even_packs(sizes: Sequence[int], capacity: int, processes: int) -> list[list[int]]:
    """Indices of the documents of as many packs for each process, about equally long, so that none waits for another:
    the longest document first, each into the shortest pack. As few packs as `capacity` allows."""
    rounds = -(-sum(sizes) // (capacity * processes))
    while True:
        packs: list[list[int]] = [[] for _ in range(min(len(sizes), rounds * processes))]
        lengths = [(0, number) for number in range(len(packs))]
        for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            length, number = lengths[0]
            packs[number].append(index)
            heapq.heapreplace(lengths, (length + sizes[index], number))
        if max(length for length, _ in lengths) <= capacity or len(packs) == len(sizes):
            return packs
        rounds += 1


def pack_step(
    rows: Sequence[int], lengths: Sequence[int], size: int, *, extra: int = 0, whole: bool = False, processes: int = 1
) -> list[list[list[int]]]:
    """The rows of one optimizer step as batches of packs of rows, each row once.

    A batch has no more tokens than `size` rows of the step's longest: packing takes no more memory than padding.

    Args:
        rows: indices into `lengths`.
        size: rows that one process takes at a time.
        extra: places that each document takes beside its own tokens (virtual tokens).
        whole: all of a process's batch in one sequence, so that nothing at all is padded; for attention that costs
            nothing across documents. Else packs are short: attention is paid for the whole pack.
        processes: a batch is shared out among so many, pack by pack.
    """
    sizes = [lengths[row] + extra for row in rows]
    budget = size * max(sizes)
    if whole:
        found = best_fit(sizes, budget) if processes == 1 else even_packs(sizes, budget, processes)
    else:
        capacities = dict.fromkeys(min(budget, int(max(sizes) * stretch)) for stretch in _STRETCHES)
        found = min((best_fit(sizes, capacity) for capacity in capacities), key=lambda packs: places(packs, sizes))
    packs = sorted(([rows[i] for i in pack] for pack in found), key=lambda pack: -sum(lengths[i] + extra for i in pack))
    longest = max(sum(lengths[i] + extra for i in pack) for pack in packs)
    together = max(1, budget // longest) * processes
    return [packs[start : start + together] for start in range(0, len(packs), together)]


def places(packs: Sequence[Sequence[int]], sizes: Sequence[int]) -> int:
    """Tokens that packs take in one batch, padding included."""
    return len(packs) * max(sum(sizes[i] for i in pack) for pack in packs)
