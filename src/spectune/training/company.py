"""How many runs are worth a pass of their rows together."""

from spectune.deltas import Delta
from spectune.families import Family
from spectune.planning.flops import flops_per_token
from spectune.training.decisions import LAUNCH_SECONDS_PER_LAYER, OPERATIONS_PER_SECOND

#: runs that share a pass, at most, where nobody says how many
MOST = 16
#: kind of device -> the seconds that a layer takes in a step however few rows there are, operations in a second
_PACE = {"cuda": (LAUNCH_SECONDS_PER_LAYER, OPERATIONS_PER_SECOND), "cpu": (1e-3, 5e10)}


def worth_sharing(family: Family, delta: Delta, *, tokens: int, length: int, device_type: str) -> int:
    """How many runs gain from one pass: as many as it takes until computing takes longer than what a pass takes
    however few rows it has.

    Args:
        tokens: of one run's batch.
        length: of a row.
    """
    a_layer, operations_per_second = _PACE.get(device_type, _PACE["cpu"])
    computing = tokens * flops_per_token(family, delta.method, max(1, length)) / operations_per_second
    return max(1, min(MOST, round(1 + len(family.layers) * a_layer / computing)))
