"""Full fine-tuning: train every weight of the base.

The yardstick of the spectrum. The base itself is the delta (`spectune.deltas.tuned_base`), so nothing can stand beside
it, and taking it off needs the copy that `attach(..., keep_base=True)` keeps in host memory.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, NoReturn

from spectune.deltas import DeltaModule, InitContext, Method, Site
from spectune.families import Family


class FullFineTuning(Method):
    """Train all weights of the base, in place."""

    name: Literal["full"] = "full"

    label: ClassVar[str] = "Full"
    best_for: ClassVar[str] = "the most data and compute, one task, quality above all"
    default_learning_rate: ClassVar[float] = 3e-4
    default_learning_rate_source: ClassVar[str] = "Li and Liang's code for GPT-2 has 5e-5; small bases take more"
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 5e-3)
    learning_rate_range_source: ClassVar[str] = (
        "1e-5 is PEFT's method comparison on a 3B base; 2e-3 was best for a 27M one on E2E"
    )
    trains_base: ClassVar[bool] = True
    can_merge: ClassVar[bool] = True

    def sites(self, family: Family) -> list[Site]:
        return []

    def build(self, site: Site) -> NoReturn:
        raise AssertionError("full fine-tuning has no sites")

    def num_parameters(self, family: Family) -> int:
        return family.num_parameters

    def num_trained_parameters(self, family: Family) -> int:
        return family.num_parameters

    def initialise(self, modules: Sequence[tuple[Site, DeltaModule]], context: InitContext) -> None:
        """The base's weights are the first weights."""
