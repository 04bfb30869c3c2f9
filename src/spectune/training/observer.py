"""What a caller of a run sees of it beside its result."""

from dataclasses import dataclass, field

from spectune.evaluation import RowLosses
from spectune.phases import Phases
from spectune.training.display import Display


@dataclass
class Observer:
    """Given to `train` by callers that want to know more.

    Attributes:
        phases: where the time goes; what came before, loading the base say, is counted as the run's.
        display: what shows how far the run is; None: one on the run's console.
        memory: whether peaks of memory are measured. That takes time, and a run whose result nobody keeps has none.
        losses: of each validation row, under the weights that the run has kept; None where they were taken in an
            earlier call.
    """

    phases: Phases = field(default_factory=Phases)
    display: Display | None = None
    memory: bool = True
    losses: RowLosses | None = None
