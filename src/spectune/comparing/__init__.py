"""Many runs on one base and one data set, measured alike and put side by side."""

from spectune.comparing.arms import Arm
from spectune.comparing.comparison import Comparison
from spectune.comparing.experiment import compare

__all__ = ["Arm", "Comparison", "compare"]
