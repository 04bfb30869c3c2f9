"""Which prompts share a pass: one pads its rows to the longest of them, and costs something by itself."""

from __future__ import annotations

from collections.abc import Sequence

#: tokens, padding included, of a pass over several prompts
MOST_TOKENS = 8192
#: a pass by itself takes as long as so many tokens more in one that there is anyway: a GPU waits for its host, which
#: starts a few thousand small kernels
PASS_COSTS, PASS_COSTS_ON_GPU = 32, 4096


def cheapest_passes(lengths: Sequence[int], pass_costs: int, most: int = MOST_TOKENS) -> list[list[int]]:
    """The numbers of the prompts of each pass, the longest prompts first.

    Args:
        lengths: places that each prompt takes.
        pass_costs: of a pass by itself, in tokens.
        most: tokens of a pass of several, padding included.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    # of the first so many: what they cost at least, and where the last pass begins then
    cheapest, begins = [0], [0]
    for end in range(1, len(order) + 1):
        found: list[tuple[int, int]] = []
        for begin in range(end - 1, -1, -1):
            tokens = (end - begin) * lengths[order[begin]]
            if tokens > most and found:
                break
            found.append((cheapest[begin] + tokens + pass_costs, begin))
        cost, begin = min(found)
        cheapest.append(cost)
        begins.append(begin)
    passes: list[list[int]] = []
    end = len(order)
    while end:
        passes.append(order[begins[end] : end])
        end = begins[end]
    return passes[::-1]
