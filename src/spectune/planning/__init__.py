"""What a method costs, from configs alone."""

from spectune.planning.counts import REFERENCE_SHAPES, Count, count, reference_shares
from spectune.planning.estimate import Estimate
from spectune.planning.plan import plan

__all__ = ["REFERENCE_SHAPES", "Count", "Estimate", "count", "plan", "reference_shares"]
