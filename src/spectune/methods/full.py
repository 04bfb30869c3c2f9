"""Full fine-tuning: train every weight of the base.

The yardstick of the spectrum. The base itself is the delta (`spectune.deltas.tuned_base`), so nothing can stand beside
it, and taking it off needs the copy that `attach(..., keep_base=True)` keeps in host memory.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, NoReturn

from spectune.deltas import SWEEPS, DeltaModule, InitContext, Method, RatePoint, RateRule, Site
from spectune.families import Family

#: their sweeps and "LoRA Without Regret" find LoRA's best at ten times that of full fine-tuning
_TENTH = "a tenth of LoRA's best in Tinker's sweeps"


class FullFineTuning(Method):
    """Train all weights of the base, in place."""

    name: Literal["full"] = "full"

    label: ClassVar[str] = "Full"
    best_for: ClassVar[str] = "the most data and compute, one task, quality above all"
    learning_rates: ClassVar[RateRule] = RateRule((
        RatePoint(224, 8e-4, SWEEPS),
        RatePoint(448, 1.4e-3, SWEEPS),
        RatePoint(640, 8e-4, SWEEPS),
        RatePoint(896, 5.5e-4, SWEEPS),
        RatePoint(2048, 1e-4, _TENTH),
        RatePoint(4096, 3e-5, _TENTH),
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
