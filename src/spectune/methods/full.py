"""Full fine-tuning: train every weight of the base.

The yardstick of the spectrum. The base itself is the delta (`spectune.deltas.tuned_base`), so nothing can stand beside
it, and taking it off needs the copy that `attach(..., keep_base=True)` keeps in host memory.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, NoReturn

from spectune.deltas import SWEEPS, TINKER, DeltaModule, InitContext, Method, RatePoint, RateRule, Site
from spectune.families import Family


class FullFineTuning(Method):
    """Train all weights of the base, in place."""

    name: Literal["full"] = "full"

    label: ClassVar[str] = "Full"
    best_for: ClassVar[str] = "the most data and compute, one task, quality above all"
    learning_rates: ClassVar[RateRule] = RateRule((
        RatePoint(224, 0.00059, SWEEPS),
        RatePoint(448, 0.0008, SWEEPS),
        RatePoint(2048, 0.0001, TINKER),
        RatePoint(4096, 3e-05, TINKER),
    ))  # fmt: skip
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
