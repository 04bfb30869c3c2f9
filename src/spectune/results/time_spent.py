"""Where the time of a comparison went: by phase, of each arm, of what is no arm's own, and in all."""

from collections.abc import Iterable, Mapping

from spectune.phases import PHASES
from spectune.results.comparison_file import ComparisonResult

SHARED, TOTAL = "Shared", "Total"


def added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The seconds of each phase in all parts together; phases of later versions stand behind those that are known."""
    found = dict.fromkeys(PHASES, 0.0)
    for part in parts:
        for phase, seconds in part.items():
            found[phase] = found.get(phase, 0.0) + seconds
    return {phase: seconds for phase, seconds in found.items() if seconds > 0}


def time_spent(comparison: ComparisonResult) -> dict[str, dict[str, float]]:
    """Seconds by phase, by the label of each arm, then of what they share, then of all. The total is the time that all
    calls took up to the verdict. Empty where the file does not say."""
    labels = comparison.labels
    found = {labels[arm.name]: arm.seconds_by_phase for arm in comparison.arms if arm.seconds_by_phase}
    if comparison.seconds_by_phase:
        found[SHARED] = comparison.seconds_by_phase
    return {**found, TOTAL: added(found.values())} if found else {}
