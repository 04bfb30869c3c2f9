"""What a method costs, from configs alone."""

from spectune.planning.counts import REFERENCE_SHAPES, Count, count, reference_shares
from spectune.planning.estimate import Estimate
from spectune.planning.memory_plan import plan
from spectune.planning.shape import Shape

__all__ = ["REFERENCE_SHAPES", "Count", "Estimate", "Shape", "count", "plan", "reference_shares"]
