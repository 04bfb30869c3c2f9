"""What a run and a comparison are: typed contents of their files, and the numbers that follow from them, each once."""

from spectune.results.comparison_file import ComparedRun, ComparisonResult
from spectune.results.recommendation import Limits, Recommendation
from spectune.results.run import RunResult
from spectune.results.verdict_record import Judgement, Verdict

__all__ = ["ComparedRun", "ComparisonResult", "Judgement", "Limits", "Recommendation", "RunResult", "Verdict"]
