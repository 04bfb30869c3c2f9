"""What a method costs, from configs alone."""

from spectune.planning.counts import REFERENCE_SHAPES, Count, count, reference_shares

__all__ = ["REFERENCE_SHAPES", "Count", "count", "reference_shares"]
