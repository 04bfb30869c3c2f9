"""Weights of lower precision are stepped in groups, so that few float32 copies of gradients are there at once.

AdamW with float32 masters holds, for each bfloat16 weight, 2 bytes of it and 2 of its gradient, 4 of its master and 8
of its moments: 16. The step itself needs the gradient in float32. Cast all at once that is 4 more; cast a group at a
time, each group's bfloat16 gradients going as their copies come, it is no more than 16 from the second group on.
"""

from collections.abc import Sequence

#: float32 bytes of a group at most; few enough to be small beside a large model, many enough for few launches
GROUP_BYTES = 2**29
#: and a group is at most this share of all, so that the same holds for a small model
GROUPS = 8
_FLOAT = 4


def step_groups(counts: Sequence[int]) -> list[list[int]]:
    """Which weights are stepped together, as indices into `counts` (numbers in each).

    The smallest come first: the copy of a large embedding is made when most gradients are gone. A weight larger than
    the limit is a group by itself.
    """
    limit = min(GROUP_BYTES, _FLOAT * sum(counts) // GROUPS)
    groups: list[list[int]] = []
    size = 0
    for index in sorted(range(len(counts)), key=lambda index: counts[index]):
        if not groups or size + _FLOAT * counts[index] > limit:
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += _FLOAT * counts[index]
    return groups
