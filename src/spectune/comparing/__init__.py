"""Many runs on one base and one data set, measured alike and put side by side."""

from spectune.comparing.compare import compare
from spectune.comparing.comparison import Comparison

__all__ = ["Comparison", "compare"]
